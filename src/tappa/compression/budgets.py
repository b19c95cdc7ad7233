"""How many tokens each layer and KV head may hold: preferences, then tokens.

A rule looks at the evidence of one layer and says how much it prefers to hold there; it never sees
the model, the tokens or their scores. `proportional` and `binary` turn preferences into tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa.compression.options import check_range
from tappa.errors import CompressionError
from tappa.similarity import DEFAULT, PAPER_KV_CACHE, VARIANTS, Variant

Need = Literal["similarity", "window", "predictability"]
FloatArray = Float[np.ndarray, " heads"]
IntArray = Int[np.ndarray, " heads"]


@dataclass(frozen=True)
class Evidence:
    """What is known of one layer of one prompt, as means or sums over query heads of a KV head."""

    layer: int  # index among the layers that are compressed
    layers: int
    kv_heads: int
    similarity: Float[Tensor, " kv_heads"] | None = None  # S of the queries in the rule's variant
    entropy: Float[Tensor, " kv_heads"] | None = None  # of the window's attention, summed
    variance: Float[Tensor, " kv_heads"] | None = None  # over the window, summed over keys
    predictability: Float[Tensor, " kv_heads"] | None = None  # least of the query heads

    def over(self, gather: Callable[[Tensor], Tensor], ranks: int) -> "Evidence":
        """Of all KV heads, where `gather` brings those of other ranks of a split model."""
        names = ("similarity", "entropy", "variance", "predictability")
        known: dict[str, Any] = {n: gather(x) for n in names if (x := getattr(self, n)) is not None}
        return replace(self, kv_heads=self.kv_heads * ranks, **known)

    def of(self, name: str) -> Float[Tensor, " kv_heads"]:
        """A figure that the rule has asked for."""
        figure = getattr(self, name)
        assert figure is not None, name
        return figure


@dataclass(frozen=True)
class Rule:
    """A preference for each KV head of a layer, what it needs to know, and who turns it to tokens.

    With `per_head` False the heads of a layer share its mean preference. A rule that looks at the
    prompt's attention may name another, `calibrated`, that a saved Analysis can feed.
    """

    preference: Callable[[Evidence], Float[Tensor, " kv_heads"]]
    needs: frozenset[Need] = frozenset()
    variant: Variant = DEFAULT
    per_head: bool = False
    binary: bool = False
    calibrated: "Rule | None" = None

    def weigh(self, evidence: Evidence) -> Float[Tensor, " kv_heads"]:
        """The preference of every KV head; NaN and infinity count as none."""
        value = self.preference(evidence).double().nan_to_num(0, 0, 0).clamp_min(0)
        return value if self.per_head else value.mean().expand_as(value)

    def prefer(self, evidence: Evidence) -> list[float]:
        """`weigh` as numbers, for which the CPU waits where the evidence is on a GPU."""
        return self.weigh(evidence).tolist()


def uniform() -> Rule:
    """The same for every layer and head."""
    return Rule(lambda e: torch.ones(e.kv_heads))


def pyramid(beta: float = 20.0) -> Rule:
    """Linear from the first layer to the last, `2 - 1/beta` to `1/beta` times the average.

    Source: PyramidKV (arXiv 2406.02069), with the shape of its reference implementation.
    """
    check_range("beta", beta, 1)

    def preference(e: Evidence) -> Tensor:
        most, least = 2 - 1 / beta, 1 / beta
        share = e.layer / max(e.layers - 1, 1)
        return torch.full((e.kv_heads,), most - share * (most - least))

    return Rule(preference)


def cake(tau1: float = 1.0, tau2: float = 1.0) -> Rule:
    """`H^(1/tau1) V^(1/tau2)`: entropy and variance of the window's attention on earlier keys.

    Source: CAKE (arXiv 2503.12491); P_CAKE of TAPPA.
    """
    _check_taus(tau1, tau2)
    return Rule(lambda e: _cake(e, tau1, tau2), frozenset({"window"}))


def tappa_paper(alpha: float = math.inf, tau1: float = 1.0, tau2: float = 1.0) -> Rule:
    """`1 - S` of the last window's queries after RoPE; with a finite alpha `P_CAKE + alpha (1-S)`.

    Source: TAPPA (arXiv 2601.21709), KV cache compression.
    """
    check_range("alpha", alpha, 0)
    _check_taus(tau1, tau2)
    if math.isinf(alpha):
        return Rule(_dissimilarity, frozenset({"similarity"}), PAPER_KV_CACHE)

    def mixed(e: Evidence) -> Tensor:
        return _cake(e, tau1, tau2) + alpha * _dissimilarity(e).mean()

    return Rule(mixed, frozenset({"similarity", "window"}), PAPER_KV_CACHE)


def similarity(
    exponent: float = 2.0,
    variant: Variant = DEFAULT,
    per_head: bool = False,
    cake_share: float = 0.0,
) -> Rule:
    """`P_CAKE^c (1 - S)^((1 - c) exponent)`, S the q-similarity in some variant, c `cake_share`.

    The default variant, before RoPE over the whole prompt, is the one that follows how sensitive
    a layer is to losing tokens. From a saved Analysis, which knows no P_CAKE of the prompt at hand,
    budgets are those of `(1 - S)^exponent`.
    """
    check_range("exponent", exponent, 0)
    if variant not in VARIANTS:
        raise CompressionError(
            f"expected a variant as (space, pairs, extent), such as ('pre', 'all', 'prompt'), "
            f"got {variant!r}"
        )
    variant = Variant(*variant)
    check_range("cake_share", cake_share, 0, 1)

    def preference(e: Evidence) -> Tensor:
        one_minus = _dissimilarity(e) if per_head else _dissimilarity(e).mean().expand(e.kv_heads)
        base = one_minus ** ((1 - cake_share) * exponent)
        return base * _cake(e, 1.0, 1.0) ** cake_share if cake_share else base

    if cake_share == 0:
        return Rule(preference, frozenset({"similarity"}), variant, per_head)
    both: frozenset[Need] = frozenset({"similarity", "window"})
    alone = similarity(exponent, variant, per_head)
    return Rule(preference, both, variant, per_head, calibrated=alone)


def retrieval_heads() -> Rule:
    """Unpredictable heads first: for `binary`, which gives them all tokens and others few.

    Source: DuoAttention (arXiv 2410.10819), with predictability in place of training.
    """
    return Rule(
        lambda e: 1 - e.of("predictability"),
        frozenset({"predictability"}),
        per_head=True,
        binary=True,
    )


def _check_taus(tau1: float, tau2: float) -> None:
    check_range("tau1", tau1, 0, above=True)
    check_range("tau2", tau2, 0, above=True)


def _dissimilarity(e: Evidence) -> Tensor:
    return (1 - e.of("similarity").nan_to_num(0)).clamp_min(0)


def _cake(e: Evidence, tau1: float, tau2: float) -> Tensor:
    """`H^(1/tau1) V^(1/tau2)` of the whole layer."""
    entropy, spread = e.of("entropy").sum(), e.of("variance").sum()
    return (entropy ** (1 / tau1) * spread ** (1 / tau2)).expand(e.kv_heads)


def allocate(rule: Rule, preference: Any, total: int, least: Any, capacity: Any) -> IntArray:
    """Tokens of every head: at most `total` in all, at least `least` (or all that a head has).

    `least` is one number, or one for each head.

    Deterministic, and no head gets less when the total grows.
    """
    preference, capacity = np.asarray(preference, float), np.asarray(capacity, np.int64)
    least_each = np.minimum(capacity, least)
    share = binary if rule.binary else proportional
    return share(preference, total, least_each, capacity)


def proportional(
    preference: FloatArray, total: int, least: IntArray, capacity: IntArray
) -> IntArray:
    """`clip(x * preference, least, capacity)` with the x that spends the total.

    What a head cannot hold goes to the others, in proportion. Rounded down.
    """
    if total >= capacity.sum():
        return capacity
    preference = preference if preference.any() else np.ones_like(preference)
    weight = preference / preference.max()
    # the sum is piecewise linear in x: find the piece that crosses the total
    with np.errstate(divide="ignore", invalid="ignore"):
        corners = np.concatenate([least / weight, capacity / weight])
    corners = np.unique(np.append(corners[np.isfinite(corners)], 0.0))

    def spent(x: float) -> float:
        return float(np.clip(x * weight, least, capacity).sum())

    low, high = 0, len(corners) - 1
    if spent(corners[0]) >= total:
        return least
    if spent(corners[high]) <= total:  # heads of preference 0 have their least, others are full
        rest = (weight == 0) * (capacity - least)
        extra = rest * min((total - spent(corners[high])) / max(rest.sum(), 1), 1.0)
        return _floor(np.clip(corners[high] * weight, least, capacity) + extra)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(corners[middle]) <= total else (low, middle)
    x0, x1 = corners[low], corners[high]
    y0, y1 = spent(x0), spent(x1)
    x = x0 + (total - y0) * (x1 - x0) / (y1 - y0)
    return _floor(np.clip(x * weight, least, capacity))


def _floor(tokens: FloatArray) -> IntArray:
    """Rounded down, where rounding errors do not count."""
    return np.floor(tokens + 1e-6).astype(np.int64)


def binary(preference: FloatArray, total: int, least: IntArray, capacity: IntArray) -> IntArray:
    """Heads in order of preference get all they can hold while the total lasts, others the least.

    The head at which it runs out gets what is left.
    """
    tokens, left = least.copy(), total - int(least.sum())
    for head in np.argsort(-preference, kind="stable"):
        extra = min(int(capacity[head] - least[head]), max(left, 0))
        tokens[head] += extra
        left -= extra
    return tokens
