"""Theorem 5.3 by intervention: move a head's dominant channel, and its diagonals move along.

What a head held in channel m* is put into channel m; its logits then repeat every `2 pi / theta_m`
tokens, which the mean logit at every lag shows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tappa.analysis import Analysis
from tappa.attention_profile import SINK_TOKENS, attention_profile
from tappa.capture import LayerView, prefill
from tappa.channels import ChannelSums
from tappa.errors import VerificationError
from tappa.rope import period
from tappa.verification.periods import spacing
from tappa.verification.swapping import base_changed, channels_swapped, must_swap_all, plain_base

TARGETS = (2, 3, 5)
TOLERANCE = 0.01  # of the spacing
LAG0_TOLERANCE = 1e-4  # of logits at lag 0: rounding in float32
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Relocation:
    """One channel moved, in one head: what theory predicts and what was measured.

    `verdict` is pass, fail, or untestable with a `reason`. `lag0` is the largest change of a logit
    at lag 0, relative to the largest such logit: 0 but for rounding.
    """

    layer: int
    head: int
    source: int
    target: int
    base_factor: float
    predicted: float
    measured: float | None = None  # from the mean logit at every lag
    attention: float | None = None  # from the mean attention at every lag
    lag0: float | None = None
    verdict: str = "untestable"
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Relative error of the spacing that logits show."""
        return None if self.measured is None else abs(self.measured / self.predicted - 1)


def choose_heads(analysis: Analysis, count: int = 6) -> list[tuple[int, int]]:
    """The heads that a single channel rules most, each of another layer and KV head.

    By share of energy times alignment of the mean query and key in it.
    """
    rows = [h for h in analysis.heads if h["dominant_channel"] is not None]
    rows.sort(key=lambda h: -h["dominant_share"] * h["alignment"])
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for row in rows:
        chosen.setdefault((row["layer"], row["kv_head"]), (row["layer"], row["head"]))
    return list(chosen.values())[:count]


def relocate(
    model: PreTrainedModel,
    ids: Sequence[int],
    heads: Sequence[tuple[int, int]],
    targets: Sequence[int] = TARGETS,
    factors: Sequence[float] = (1.0,),
    progress: Progress | None = None,
) -> list[Relocation]:
    """Move the dominant channel of every head to every target, under every factor of the base.

    Raises VerificationError for a head or a channel that does not exist.
    """
    found: list[Relocation] = []
    total = len(heads) * len(targets)
    for layer, head in heads:
        view = view_of(model, ids, layer)
        source = dominant_of(view, head)
        for target in targets:
            if progress is not None:
                progress(len(found) // max(len(factors), 1), total)
            found += _relocate_to(model, ids, view, head, source, target, factors)
    return found


@contextmanager
def channel_moved(
    model: PreTrainedModel, plain: LayerView, head: int, source: int, target: int
) -> Iterator[list[int]]:
    """Inside of a `with` two channels of a head are swapped; gives the KV heads that this alters.

    These are the head's own, or all of the layer where they share norms.
    """
    kv_heads = [head // (len(plain.queries) // len(plain.keys))]
    if must_swap_all(model, plain.layer, plain.rotary.dim):
        kv_heads = list(range(len(plain.keys)))
    with channels_swapped(model, plain.layer, kv_heads, plain.rotary, source, target):
        yield kv_heads


def view_of(model: PreTrainedModel, ids: Sequence[int], layer: int) -> LayerView:
    """Queries and keys of one layer on a prompt; later layers do not run."""
    seen: list[LayerView] = []

    def consume(view: LayerView) -> None:
        if view.layer == layer:
            seen.append(view)
            raise _Enough

    try:
        prefill(model, torch.tensor([list(ids)]), consume, logits_to_keep=1)
    except _Enough:
        return seen[0]
    raise VerificationError(
        f"expected a layer from 0 to {model.config.get_text_config().num_hidden_layers - 1}, "
        f"got {layer}"
    )


class _Enough(Exception):
    """The layer has been seen."""


def dominant_of(view: LayerView, head: int) -> int:
    """The dominant channel of a head. Raises VerificationError where there is none."""
    if not 0 <= head < len(view.queries):
        raise VerificationError(f"expected a head from 0 to {len(view.queries) - 1}, got {head}")
    if len(view.rotary.theta) == 0:
        raise VerificationError(f"no channel of layer {view.layer} is rotated")
    sums = ChannelSums(view.rotary)
    sums.add(view.queries, view.keys)
    return int(sums.dominant()[head])


def _relocate_to(
    model: PreTrainedModel,
    ids: Sequence[int],
    plain: LayerView,
    head: int,
    source: int,
    target: int,
    factors: Sequence[float],
) -> list[Relocation]:
    """One target under every factor of the base."""
    theta = plain.rotary.theta
    if not 0 <= target < len(theta):
        raise VerificationError(
            f"expected a target channel from 0 to {len(theta) - 1}, got {target}"
        )
    wanted = [
        _predict(model, plain, head, source, target, factor, len(ids) - SINK_TOKENS)
        for factor in factors
    ]
    if all(one.reason for one in wanted):
        return wanted
    with channel_moved(model, plain, head, source, target) as kv_heads:
        moved = view_of(model, ids, plain.layer)
        lag0 = _lag0_change(plain, moved, kv_heads)
        return [_measure(model, ids, one, moved, lag0) for one in wanted]


def _predict(
    model: PreTrainedModel,
    plain: LayerView,
    head: int,
    source: int,
    target: int,
    factor: float,
    tokens: int,
) -> Relocation:
    """What theory says, or why it cannot be tested."""
    theta = plain.rotary.theta
    one = Relocation(plain.layer, head, source, target, factor, period(float(theta[target])))
    if source == target:
        return replace(one, reason="the target is the dominant channel already")
    if factor != 1:
        try:
            base = plain_base(model)
        except VerificationError as error:
            return replace(one, reason=str(error))
        if base * factor <= 1:
            return replace(one, reason=f"a base of {base * factor:g} is none")
        # d is the number of rotated dimensions: 2 len(theta)
        one = replace(one, predicted=2 * math.pi * (base * factor) ** (target / len(theta)))
    if not 2 <= one.predicted <= tokens / 3:
        return replace(one, reason=f"a period of {one.predicted:.1f} does not fit {tokens} tokens")
    return one


def _measure(
    model: PreTrainedModel, ids: Sequence[int], one: Relocation, moved: LayerView, lag0: float
) -> Relocation:
    """The spacing while the channel is moved; the base is changed on top where it is to be."""
    if one.reason:
        return one
    if one.base_factor != 1:
        with base_changed(model, one.base_factor):
            moved = view_of(model, ids, one.layer)
    logits, attention = profiles(moved, one.head)
    one = replace(one, measured=spacing(logits), attention=spacing(attention), lag0=lag0)
    passed = one.error is not None and one.error <= TOLERANCE and lag0 <= LAG0_TOLERANCE
    return replace(one, verdict="pass" if passed else "fail")


def profiles(view: LayerView, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean logit and mean attention of a head at every lag, without the first tokens.

    A sink's key is unlike all others, and at long lags few others are left to average it away.
    """
    kv_head = head // (len(view.queries) // len(view.keys))
    queries = view.queries[head : head + 1, SINK_TOKENS:]
    keys = view.keys[kv_head : kv_head + 1, SINK_TOKENS:]
    found = attention_profile(queries, keys, view.attention, queries.shape[1])
    counts = found.lag_counts.clamp_min(1).cpu()
    shown = int((found.lag_counts > 0).sum())  # a sliding window shows no others
    logits, attention = (x[0].cpu() / counts for x in (found.lag_logits, found.lag_attention))
    return logits[:shown].double().numpy(), attention[:shown].double().numpy()


def _lag0_change(before: LayerView, after: LayerView, kv_heads: Sequence[int]) -> float:
    group = len(before.queries) // len(before.keys)
    heads = [h for g in kv_heads for h in range(g * group, (g + 1) * group)]
    old, new = (_lag0(view, group)[heads] for view in (before, after))
    return float((old - new).abs().max() / old.abs().max().clamp_min(1e-30))


def _lag0(view: LayerView, group: int) -> Float[Tensor, "heads steps"]:
    """The logit of every query with the key at its own position."""
    return torch.linalg.vecdot(view.queries, view.keys.repeat_interleave(group, 0))
