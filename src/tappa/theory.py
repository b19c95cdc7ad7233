"""The shift bound of TAPPA and its special cases, checked against the logits of a layer.

A `Layer` holds post-RoPE queries and keys of one prompt and the same vectors before RoPE,
`q_t = R_t^-1 q~_t`. Bounds are checked on sampled pairs (t, i): H heads, R rows, I keys for each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Real
from torch import Tensor

from tappa.fetching import send
from tappa.rope import RotaryChannels

# Rounding allowed in a logit, as a share of |q||k|: about 100 float32 roundings.
TOLERANCE = 1e-5
# Tightness (bound / actual) is counted in bins of a quarter of a doubling; the last one is open.
UNDERFLOW = 1e-17  # norms below are not known: the squares of such numbers are 0 in float32
BINS_PER_DOUBLING, BINS = 4, 48
BOUNDS = (
    "vertical",
    "sequential",
    "seasonal",
    "seasonal_rows",
    "seasonal_columns",
    "jump",
    "residual",
)


@dataclass(frozen=True)
class Layer:
    """Queries and keys of one layer; row r is position `query_start + r`, key i `key_start + i`.

    Without vectors before RoPE, those that are sampled are turned back.
    """

    queries: Float[Tensor, "heads steps dim"]  # post-RoPE
    queries_before: Float[Tensor, "heads steps dim"] | None
    keys: Float[Tensor, "kv_heads past dim"]  # post-RoPE
    keys_before: Float[Tensor, "kv_heads past dim"] | None
    rotary: RotaryChannels
    scale: float
    query_start: int = 0
    key_start: int = 0

    def sample_keys(
        self, rows: Int[Tensor, "heads rows"], count: int, v: Int[Tensor, " heads"]
    ) -> Int[Tensor, "heads rows keys"]:
        """Up to `count` keys for each row, evenly spread over those not later than its query.

        Shifted by v they still exist. Where a row has fewer keys, some are taken twice.
        """
        last = rows + self.query_start - self.key_start
        last = torch.minimum(last, self.keys.shape[1] - 1 - v[:, None]).clamp_min(0)
        share = torch.linspace(0, 1, count, device=rows.device)
        return (last[..., None] * share).round().long()


@dataclass(frozen=True)
class Points:
    """Vectors of sampled queries and keys, with the logits between them."""

    query: Float[Tensor, "heads rows dim"]
    query_before: Float[Tensor, "heads rows dim"]
    key: Float[Tensor, "heads rows keys dim"]
    key_before: Float[Tensor, "heads rows keys dim"]
    scale: float

    @classmethod
    def of(
        cls, layer: Layer, rows: Int[Tensor, "heads rows"], keys: Int[Tensor, "heads rows keys"]
    ) -> "Points":
        """Take the vectors of these queries and keys out of a layer, all of its heads in turn.

        The heads may come several times, one set after the other.
        """
        heads = len(layer.queries)
        head = torch.arange(len(rows), device=layer.queries.device) % heads
        kv = (head // (heads // len(layer.keys)))[:, None, None]
        at = (head[:, None], rows), (kv, keys)
        query, key = layer.queries[at[0]].float(), layer.keys[at[1]].float()
        if layer.queries_before is None or layer.keys_before is None:
            query_before = layer.rotary.rotate(query, -(rows + layer.query_start))
            key_before = layer.rotary.rotate(key, -(keys + layer.key_start))
        else:
            query_before, key_before = layer.queries_before[at[0]], layer.keys_before[at[1]]
        return cls(query, query_before, key, key_before, layer.scale)

    def first(self, heads: int) -> "Points":
        """Those of the first heads."""
        query, before = self.query[:heads], self.query_before[:heads]
        return Points(query, before, self.key[:heads], self.key_before[:heads], self.scale)

    def logits(self) -> Float[Tensor, "heads rows keys"]:
        return self.scale * dot(self.query, self.key)

    def slack(self) -> Float[Tensor, "heads rows keys"]:
        """Rounding allowed for each logit, that of norms below UNDERFLOW included."""
        query, key = self.query.norm(dim=-1, keepdim=True), self.key.norm(dim=-1)
        return self.scale * (TOLERANCE * query * key + UNDERFLOW * (query + key + UNDERFLOW))


def dot(
    rows: Float[Tensor, "heads rows dim"], keys: Float[Tensor, "heads rows keys dim"]
) -> Float[Tensor, "heads rows keys"]:
    """Inner product of every row with each of its keys."""
    return torch.matmul(keys, rows[..., None])[..., 0]


@dataclass
class BoundCheck:
    """How a bound fared on each head: pairs checked, violations, histogram of its tightness.

    Tightness is `bound / actual` for an upper bound and `actual / bound` for a lower one, so it is
    at least 1 and 1 is perfect. It is not defined where nothing changes, or where a lower bound is
    negative and says nothing: such pairs are checked but not in the histogram.
    """

    checked: Int64[Tensor, " heads"]
    violations: Int64[Tensor, " heads"]
    tightness: Int64[Tensor, "heads bins"]

    @classmethod
    def none(cls, heads: int, device: torch.device | str = "cpu") -> "BoundCheck":
        """Nothing checked."""
        counts = torch.zeros(heads, 1 + BINS, dtype=torch.int64, device=device)
        return cls(counts[:, 0], counts[:, 0], counts[:, 1:])

    @classmethod
    def of(
        cls,
        lower: Float[Tensor, "heads rows keys"],
        upper: Float[Tensor, "heads rows keys"],
        slack: Float[Tensor, "heads rows keys"],
    ) -> "BoundCheck":
        """Check `lower <= upper + slack` for every pair (NaN is a violation)."""
        heads = len(lower)
        ratio = (upper / lower.clamp_min(1e-30)).clamp_min(1e-30).log2()
        bins = (ratio * BINS_PER_DOUBLING).long().clamp(0, BINS - 1)
        says = lower > slack
        counts = torch.zeros(heads, BINS, dtype=torch.int64, device=bins.device)
        counts.scatter_add_(1, bins.flatten(1), says.flatten(1).long())
        violated = ~(lower <= upper + slack)
        return cls(
            checked=torch.full((heads,), lower[0].numel(), device=bins.device),
            violations=violated.sum((1, 2)),
            tightness=counts,
        )

    def split(self, heads: int) -> "list[BoundCheck]":
        """The checks of so many heads each."""
        parts = (x.split(heads) for x in (self.checked, self.violations, self.tightness))
        return [BoundCheck(*part) for part in zip(*parts, strict=True)]


def median_tightness(histogram: Real[Tensor, " bins"] | Real[np.ndarray, " bins"]) -> float:
    """Median of bound / actual from its histogram, to within a bin (19%); NaN if it is empty."""
    counts = np.asarray(histogram)
    total = float(counts.sum())
    if total == 0:
        return float("nan")
    cumulative = counts.cumsum()
    index = int((cumulative < total / 2).sum())
    before = float(cumulative[index - 1]) if index else 0.0
    within = (total / 2 - before) / float(counts[index])
    return float(2.0 ** ((index + within) / BINS_PER_DOUBLING))


def shift_bound(
    rotary: RotaryChannels, now: Points, then: Points, shift: Int[Tensor, " heads"]
) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"]]:
    """(actual change, bound) of logits from (t, i) to (t + u, i + v), with `shift = v - u`.

    `|a[t+u, i+v] - a[t, i]| <= scale * sum_m ( |q_(t+u) - q_t| |k_(i+v)| + |q_t| |k_(i+v) - k_i|
    + chord((v-u) theta_m) |q_t| |k_i| )`, norms taken in channel m. Holds for every t and i.

    Source: TAPPA Theorems 5.1 (1, 0), 5.2 (1, 1), 5.3 (0, T), 5.4 ((L, 0), (0, L), (L, L)).
    """
    query, key = rotary.norms(now.query_before), rotary.norms(now.key_before)
    query_change = rotary.norms(then.query_before - now.query_before)
    key_change = rotary.norms(then.key_before - now.key_before)
    bound = dot(query_change, rotary.norms(then.key_before)) + dot(query, key_change)
    bound = bound + dot(query * rotary.chord(shift)[:, None], key)
    return (then.logits() - now.logits()).abs(), now.scale * bound


def jump_bound(
    rotary: RotaryChannels, now: Points, then: Points, positions: Int[Tensor, "heads rows"]
) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"]]:
    """(actual change, lower bound) of logits from (t, i) to (t + 1, i): low q-similarity jumps.

    `|a[t+1, i] - a[t, i]| >= scale * ( |<R_(t+1)(q_(t+1) - q_t), k~_i>|
    - sum_m chord(theta_m) |q_t| |k_i| )`. Source: TAPPA Proposition 4.1.
    """
    step = then.query_before - now.query_before
    turned = rotary.rotate(step, positions + 1)
    turning = dot(rotary.norms(now.query_before) * rotary.chord(1), rotary.norms(now.key_before))
    bound = now.scale * (dot(turned, now.key).abs() - turning)
    return (then.logits() - now.logits()).abs(), bound


def residual_bound(
    rotary: RotaryChannels, points: Points, channel: Int[Tensor, " heads"]
) -> tuple[Float[Tensor, "heads rows keys"], Float[Tensor, "heads rows keys"]]:
    """(actual, bound) of what the dominant channel m* of each head leaves unexplained of a logit.

    `|a[t, i] - scale |q^m*||k^m*| cos(phi + (i-t) theta_m*)| <= scale * sum_(m != m*) |q^m||k^m|`.
    Source: TAPPA Theorem 5.3 (periodic diagonals of spacing `2 pi / theta_m*`).
    """
    head = torch.arange(len(channel), device=channel.device)
    query, key = rotary.pairs(points.query), rotary.pairs(points.key)
    dominant = query[head, :, channel][..., None].conj() * key[head, :, :, channel]
    others = torch.ones(len(channel), rotary.channels, device=channel.device)
    others.scatter_(1, channel[:, None], 0.0)  # a number by index would have a GPU waited for
    bound = dot(rotary.norms(points.query) * others[:, None], rotary.norms(points.key))
    return (points.logits() - points.scale * dominant.real).abs(), points.scale * bound


def check_bounds(
    layer: Layer,
    season: Int[Tensor, " heads"],
    channel: Int[Tensor, " heads"],
    rows: int,
    keys: int,
) -> dict[str, BoundCheck]:
    """Check every bound on `rows` queries of every head and `keys` keys of each.

    `season` is the lag L of Theorem 5.4 for each head (0: none fits the prompt), `channel` the
    dominant channel of Theorem 5.3. Bounds that cannot be tried are left out; where a head has
    fewer rows, some are taken twice. With `season` on the CPU, a GPU need not be waited for. All
    bounds are worked out together: on a GPU, each operation takes as long for one as for all.
    """
    steps, heads = layer.queries.shape[1], len(layer.queries)
    shifts = {
        name: (u, v)
        for name, (u, v) in _shifts(season).items()
        if steps > int(torch.maximum(u, v).max())
        and not (name.startswith("seasonal") and int(season.min()) == 0)
    }
    if not shifts:
        return {}
    u, v = (torch.cat(part) for part in zip(*shifts.values(), strict=True))
    share = torch.linspace(0, 1, rows)
    at = ((steps - u - 1)[:, None] * share).round().long()
    at, u, v = (send(x, layer.queries.device) for x in (at, u, v))
    key_at = layer.sample_keys(at, keys, v)
    now = Points.of(layer, at, key_at)
    then = Points.of(layer, at + u[:, None], key_at + v[:, None, None])
    slack = now.slack() + then.slack()
    lower, upper = shift_bound(layer.rotary, now, then, v - u)
    names, parts = [*shifts], [(lower, upper, slack)]
    if "vertical" in shifts:
        here = now.first(heads)
        change, least = jump_bound(
            layer.rotary, here, then.first(heads), at[:heads] + layer.query_start
        )
        names, parts = [*names, "jump"], [*parts, (least, change, slack[:heads])]
        if len(layer.rotary.theta):
            unexplained = residual_bound(layer.rotary, here, channel)
            names, parts = [*names, "residual"], [*parts, (*unexplained, slack[:heads])]
    every = BoundCheck.of(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return dict(zip(names, every.split(heads), strict=True))


def _shifts(season: Int[Tensor, " heads"]) -> dict[str, tuple[Tensor, Tensor]]:
    """(u, v) of every special case of the shift bound; "vertical" first."""
    one, none = torch.ones_like(season), torch.zeros_like(season)
    return {
        "vertical": (one, none),
        "sequential": (one, one),
        "seasonal": (season, season),
        "seasonal_rows": (season, none),
        "seasonal_columns": (none, season),
    }


def spread_rows(steps: Int[Tensor, " heads"], count: int) -> Int[Tensor, "heads rows"]:
    """For every head, up to `count` rows below its `steps`, evenly spread."""
    count = min(count, int(steps.min()))
    return ((steps[:, None] - 1) * torch.linspace(0, 1, count, device=steps.device)).round().long()
