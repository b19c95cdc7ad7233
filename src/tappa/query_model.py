"""What the theory expects of a head, from queries, keys and frequencies alone.

TAPPA says: a head is predictable because its queries are self-similar, and its pattern follows
from its keys and RoPE. Taken literally, queries are a constant plus noise that knows nothing of
the keys. This module builds such queries, with the statistics of the real ones, lets them attend
to the real keys, and measures how much of the attention persists. A head whose attention depends
on which query meets which key (retrieval) behaves otherwise; that gap is what agreement measures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa import kernels
from tappa.attention_profile import SINK_TOKENS, attention_rows, persistence
from tappa.capture import LayerView
from tappa.fetching import send
from tappa.rope import RotaryChannels


@dataclass(frozen=True)
class QueryModel:
    """`q_t = mean + e_t` before RoPE: e is Gaussian, of variance v_m in channel m, and its

    correlation over u steps is `1 - E|q_(t+u) - q_t|^2 / (2 v_m)` as with the real queries.
    The more self-similar the queries, the smaller the noise.
    """

    mean: Float[Tensor, "heads 1 dim"]
    variance: Float[Tensor, "heads channels"]  # of a whole channel: the sum over its dimensions
    rotary: RotaryChannels

    @classmethod
    def of_view(
        cls, view: LayerView, steps: Sequence[Int[Tensor, " heads"]]
    ) -> "tuple[QueryModel, list[Float[Tensor, 'heads channels']]]":
        """Fit to the queries of a layer; and their `mean_change` for every u of `steps`.

        With `steps` on the CPU, a GPU need not be waited for.
        """
        rotary, queries = view.rotary, view.model_queries
        shifts = torch.stack(list(steps))
        on_device = send(shifts.int(), queries.device)
        sums = kernels.query_sums(queries, rotary, view.query_start, on_device)
        if sums is None:
            before = view.queries_before
            return cls.of(rotary, before), [mean_change(rotary, before, u) for u in steps]
        count = queries.shape[1]
        offset, squares, changes = (x / n for x, n in zip(sums, (count, count, 1), strict=True))
        at = torch.full((len(queries), 1), -(view.query_start + count // 2), device=queries.device)
        origin = rotary.rotate(queries[:, count // 2 : count // 2 + 1].float(), at)
        variance = (squares - rotary.by_channel(offset.square())).float()
        pairs = send((count - shifts)[..., None], changes.device)
        model = cls(origin + offset.float()[:, None], variance.clamp_min(0), rotary)
        return model, list((changes / pairs).float())

    @classmethod
    def of(cls, rotary: RotaryChannels, queries: Float[Tensor, "heads steps dim"]) -> "QueryModel":
        """Fit to the queries of a prompt before RoPE."""
        variance = rotary.by_channel(queries.var(dim=1, correction=0))
        return cls(queries.mean(1, keepdim=True), variance, rotary)

    def correlation(self, change: Float[Tensor, "heads channels"]) -> Float[Tensor, "heads 1 dim"]:
        """Correlation of the noise at two steps with mean squared change `change` between them."""
        tiny = torch.finfo(change.dtype).tiny
        value = 1 - change / (2 * self.variance).clamp_min(tiny)
        return self.rotary.spread(value.clamp(-1, 1))[:, None]

    def draw(
        self, positions: Int[Tensor, "heads rows"], noise: Float[Tensor, "heads rows dim"]
    ) -> Float[Tensor, "heads rows dim"]:
        """Post-RoPE queries at some positions, from standard normal noise."""
        sizes = self.rotary.by_channel(torch.ones_like(self.mean[0, 0]))
        deviation = self.rotary.spread((self.variance / sizes).sqrt())[:, None]
        return self.rotary.rotate(self.mean + deviation * noise, positions)


def mean_change(
    rotary: RotaryChannels, queries: Float[Tensor, "heads steps dim"], u: Int[Tensor, " heads"]
) -> Float[Tensor, "heads channels"]:
    """`E |q_(t+u) - q_t|^2` of every channel, with a u for each head (0 where u is 0)."""
    changes = [
        (q[step:] - q[: len(q) - step]).square().mean(0)
        for q, step in zip(queries, u.tolist(), strict=True)
    ]
    return rotary.by_channel(torch.stack(changes))


def expected_rows(
    view: LayerView, rows: Int[Tensor, "heads rows"], steps: Sequence[Int[Tensor, " heads"]]
) -> Iterator[Float[Tensor, "heads rows past"]]:
    """Attention of the model's queries at some rows, then u rows later for every u of `steps`.

    A u holds a number for each head.
    """
    model, changes = QueryModel.of_view(view, steps)
    device = view.model_queries.device
    heads = len(rows) * view.shards.ranks  # a head's noise is the same on whatever rank it is
    every = _noise((1 + len(steps), heads, rows.shape[1], view.rotary.dim), device)
    noise = view.shards.mine(every.transpose(0, 1)).transpose(0, 1)
    rows = send(rows, device)

    def attend(at: Int[Tensor, "heads rows"], noise: Tensor) -> Tensor:
        positions = at + view.query_start
        drawn = model.draw(positions, noise)
        return attention_rows(drawn, positions, view.keys, view.attention, view.key_start)

    yield attend(rows, noise[0])
    for u, change, fresh in zip(steps, changes, noise[1:], strict=True):
        same = model.correlation(change)
        at = rows + send(u, device)[:, None]
        yield attend(at, same * noise[0] + (1 - same.square()).sqrt() * fresh)


def expected_persistence(
    view: LayerView, rows: Int[Tensor, "heads rows"], season: Int[Tensor, " heads"]
) -> Float[Tensor, "heads 5"]:
    """What the model expects, summed over some rows: persistence under the shifts (1, 0), (1, 1),
    (L, L), (L, 0), and attention on the first tokens.
    With `rows` and `season` on the CPU, a GPU need not be waited for.
    """
    steps = [torch.ones_like(season), season]
    now, step, later = expected_rows(view, rows, steps)
    lag = send(season, now.device)
    sums = (
        persistence(now, step, 0),
        persistence(now, step, 1),
        persistence(now, later, lag),
        persistence(now, later, 0),
        now[..., : max(SINK_TOKENS - view.key_start, 0)].sum((1, 2)),
    )
    return torch.stack(sums, 1)


@lru_cache(maxsize=4)
def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers, the same ones each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def observed_seasons(
    view: LayerView, rows: Int[Tensor, "heads rows"], season: Int[Tensor, " heads"]
) -> Float[Tensor, "heads 3"]:
    """Real persistence under the shifts (L, L), (L, 0) and (0, L), summed over some rows."""
    rows, season = (send(x, view.model_queries.device) for x in (rows, season))
    head = torch.arange(len(rows), device=rows.device)[:, None]

    def attend(at: Int[Tensor, "heads rows"]) -> Tensor:
        queries = view.model_queries[head, at].float()
        where = (at + view.query_start, view.keys, view.attention, view.key_start)
        return attention_rows(queries, *where)

    now, later = attend(rows), attend(rows + season[:, None])
    sums = (
        persistence(now, later, season),
        persistence(now, later, 0),
        persistence(now, now, season),
    )
    return torch.stack(sums, 1)
