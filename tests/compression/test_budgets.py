import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa.compression.budgets import (
    Evidence,
    Rule,
    allocate,
    binary,
    cake,
    proportional,
    pyramid,
    retrieval_heads,
    similarity,
    tappa_paper,
    uniform,
)
from tappa.similarity import DEFAULT, PAPER_KV_CACHE, VARIANTS, Variant

# preference and capacity of each head, the least, and the total
Case = tuple[list[float], list[int], int, int]
ANY = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))


def cases(preferences: st.SearchStrategy = ANY, capacity: int = 97) -> st.SearchStrategy[Case]:
    head = st.tuples(preferences, st.integers(0, capacity))
    heads = st.lists(head, min_size=1, max_size=7)
    return st.tuples(heads, st.integers(0, 13), st.integers(0, 7 * capacity)).map(
        lambda x: ([p for p, _ in x[0]], [c for _, c in x[0]], x[1], x[2])
    )


def tokens(
    preference: list[Any], total: int, least: int, capacity: list[int], rule: Rule | None = None
) -> list[int]:
    return allocate(rule or uniform(), preference, total, least, capacity).tolist()


@pytest.mark.parametrize(
    ("preference", "total", "least", "capacity", "expected"),
    [
        ([1, 2, 4], 70, 0, [100, 100, 100], [10, 20, 40]),
        ([0.5, 1, 2], 70, 7, [100, 100, 100], [10, 20, 40]),
        ([1, 2, 4], 70, 0, [100, 100, 19], [17, 34, 19]),  # 21 go to the others, 1 : 2
        ([1, 2, 4], 70, 0, [100, 11, 19], [40, 11, 19]),
        ([0, 1, 3], 45, 5, [100, 100, 100], [5, 10, 30]),
        ([1, 10, 10], 45, 5, [100, 100, 100], [5, 20, 20]),
        ([1, 1, 1], 35, 0, [100, 100, 100], [11, 11, 11]),  # rounded down
        ([0, 0, 0], 33, 2, [100, 100, 100], [11, 11, 11]),  # all alike
        ([0, 0, 0], 33, 2, [100, 3, 100], [15, 3, 15]),
        ([0, 0, 7], 33, 2, [100, 100, 19], [7, 7, 19]),  # nobody wants the rest: in equal parts
        ([0, 0, 7], 19, 0, [100, 100, 19], [0, 0, 19]),
        ([3, 5, 7], 29, 0, [2, 3, 5], [2, 3, 5]),
        ([3, 5, 7], 10, 0, [2, 3, 5], [2, 3, 5]),
        ([3, 5, 7], 4, 11, [2, 13, 17], [2, 11, 11]),  # the least, though it is more
        ([3, 5, 7], 0, 0, [2, 13, 17], [0, 0, 0]),
        ([7], 13, 2, [17], [13]),
    ],
)
def test_proportional_by_hand(
    preference: list[float], total: int, least: int, capacity: list[int], expected: list[int]
) -> None:
    assert tokens(preference, total, least, capacity) == expected


@settings(deadline=None, max_examples=200)
@given(cases())
def test_proportional_keeps_its_bounds(case: Case) -> None:
    preference, capacity, least, total = case
    share = tokens(preference, total, least, capacity)
    bottom = [min(least, c) for c in capacity]
    assert sum(share) <= max(total, sum(bottom))
    for low, count, high in zip(bottom, share, capacity, strict=True):
        assert low <= count <= high


@settings(deadline=None, max_examples=200)
@given(cases())
def test_proportional_wastes_less_than_a_token_for_each_head(case: Case) -> None:
    preference, capacity, least, total = case
    share = tokens(preference, total, least, capacity)
    assert min(total, sum(capacity)) - sum(share) < len(capacity)


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(1, 3))
def test_no_head_gets_less_of_more(case: Case, more: int) -> None:
    preference, capacity, least, total = case
    small = tokens(preference, total, least, capacity)
    large = tokens(preference, total + more, least, capacity)
    assert all(a <= b for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("weight", [1 / 3, 1 / 7, 1 / 49, 1 / 93])
@pytest.mark.parametrize("capacity", [1, 49, 61])
def test_heads_of_no_preference_wait_until_others_are_full(weight: float, capacity: int) -> None:
    preference, capacities = [1.0, weight, 0.0], [13, capacity, 17]
    for rest in range(17):
        share = tokens(preference, 13 + capacity + rest, 0, capacities)
        assert share[:2] == [13, capacity]
        assert share[2] in (rest - 1, rest)


def exact(preference: list[int], total: int, least: list[int], capacity: list[int]) -> list[int]:
    """`floor(clip(x p, least, capacity))` with the x that spends the total, in fractions."""
    if total >= sum(capacity):
        return capacity
    wanted = preference if any(preference) else [1] * len(preference)

    def clipped(x: Fraction) -> list[Fraction]:
        bounds = zip(wanted, least, capacity, strict=True)
        return [max(Fraction(low), min(Fraction(high), x * p)) for p, low, high in bounds]

    corners = {Fraction(0)}
    for p, low, high in zip(wanted, least, capacity, strict=True):
        corners |= {Fraction(low, p), Fraction(high, p)} if p else set()
    before = max(x for x in corners if sum(clipped(x)) <= max(total, sum(least)))
    after = [x for x in corners if x > before]
    found, left = clipped(before), max(total - sum(clipped(before)), Fraction(0))
    if after:
        step = [b - a for a, b in zip(found, clipped(min(after)), strict=True)]
    else:
        step = [high - a for high, a in zip(capacity, found, strict=True)]
    share = left / sum(step) if left else Fraction(0)
    return [math.floor(a + share * s) for a, s in zip(found, step, strict=True)]


@settings(deadline=None, max_examples=200)
@given(cases(st.integers(0, 31), 31))
@example(([0, 3, 31], [1, 7, 0], 0, 7))
@example(([0, 1], [49, 0], 0, 1))
def test_proportional_is_that_of_exact_fractions(case: tuple) -> None:
    preference, capacity, least, total = case
    bottom = [min(least, c) for c in capacity]
    assert tokens(preference, total, least, capacity) == exact(preference, total, bottom, capacity)


@settings(deadline=None)
@given(cases(), st.floats(1e-6, 1e6))
def test_only_ratios_of_preferences_matter(case: Case, factor: float) -> None:
    preference, capacity, least, total = case
    scaled = tokens([p * factor for p in preference], total, least, capacity)
    for a, b in zip(scaled, tokens(preference, total, least, capacity), strict=True):
        assert abs(a - b) <= 1


@given(st.integers(1, 61), st.integers(1, 61), st.integers(0, 37))
def test_uniform_is_exactly_the_budget(heads: int, budget: int, more: int) -> None:
    capacity = [budget + more] * heads
    assert tokens([1.0] * heads, budget * heads, 0, capacity) == [budget] * heads
    assert tokens([0.3] * heads, budget * heads, budget, capacity) == [budget] * heads


@pytest.mark.parametrize(
    ("preference", "total", "least", "capacity", "expected"),
    [
        ([0.1, 0.7, 0.5], 43, 5, [31, 31, 31], [5, 31, 7]),
        ([0.1, 0.7, 0.5], 70, 5, [31, 31, 31], [8, 31, 31]),
        ([0.1, 0.7, 0.5], 15, 5, [31, 31, 31], [5, 5, 5]),
        ([0.1, 0.7, 0.5], 11, 5, [31, 31, 31], [5, 5, 5]),  # the least, though it is more
        ([0.1, 0.7, 0.5], 99, 5, [31, 31, 31], [31, 31, 31]),
        ([0.5, 0.5, 0.5], 29, 2, [13, 13, 13], [13, 13, 3]),  # ties: the earlier head
        ([0.1, 0.7, 0.5], 43, 5, [31, 3, 31], [9, 3, 31]),
        ([0.0, 0.0], 17, 2, [13, 13], [13, 4]),
    ],
)
def test_binary_by_hand(
    preference: list[float], total: int, least: int, capacity: list[int], expected: list[int]
) -> None:
    assert tokens(preference, total, least, capacity, retrieval_heads()) == expected


@settings(deadline=None)
@given(cases())
def test_binary_spends_all_and_only_grows(case: Case) -> None:
    preference, capacity, least, total = case
    bottom = [min(least, c) for c in capacity]
    share = tokens(preference, total, least, capacity, retrieval_heads())
    assert sum(share) == min(max(total, sum(bottom)), sum(capacity))
    assert all(a <= b <= c for a, b, c in zip(bottom, share, capacity, strict=True))
    more = tokens(preference, total + 1, least, capacity, retrieval_heads())
    assert all(a <= b for a, b in zip(share, more, strict=True))


@pytest.mark.parametrize("share", [proportional, binary])
def test_arguments_are_left_as_they_are(share: Any) -> None:
    preference, least, capacity = np.array([2.0, 3.0]), np.array([5, 5]), np.array([11, 13])
    share(preference, 17, least, capacity)
    assert (preference.tolist(), least.tolist(), capacity.tolist()) == ([2, 3], [5, 5], [11, 13])


def layer(number: int = 0, layers: int = 5, **known: Any) -> Evidence:
    return Evidence(number, layers, 3, **{name: torch.tensor(x) for name, x in known.items()})


SIMILAR: dict[str, Any] = {"similarity": [0.5, 0.25, 0.75]}  # 1 - S is 1/2 on average
WINDOW: dict[str, Any] = {"entropy": [3.0, 5.0, 8.0], "variance": [0.5, 1.5, 2.0]}  # sums 16 and 4


def preferred(rule: Rule, evidence: Evidence) -> list[float]:
    return pytest.approx(rule.prefer(evidence))  # type: ignore[return-value]


def test_uniform_prefers_nobody() -> None:
    assert preferred(uniform(), layer()) == [1, 1, 1]
    assert not uniform().needs


@pytest.mark.parametrize(
    ("beta", "number", "expected"),
    [(20.0, 0, 1.95), (20.0, 2, 1), (20.0, 4, 0.05), (2.0, 0, 1.5), (2.0, 1, 1.25), (2.0, 4, 0.5)],
)
def test_pyramid(beta: float, number: int, expected: float) -> None:
    assert [expected] * 3 == preferred(pyramid(beta), layer(number))


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_the_pyramid_is_1_on_average(layers: int) -> None:
    every = [pyramid().prefer(layer(n, layers))[0] for n in range(layers)]
    assert sum(every) == pytest.approx(layers)
    assert every == sorted(every, reverse=True)


def test_a_pyramid_of_one_layer() -> None:
    share = pyramid().prefer(layer(0, 1))
    assert tokens(share, 39, 0, [97] * 3) == [13] * 3


@pytest.mark.parametrize(
    ("tau1", "tau2", "expected"),
    [(1.0, 1.0, 64), (2.0, 1.0, 16), (1.0, 2.0, 32), (0.5, 1.0, 1024), (4.0, 2.0, 4)],
)
def test_cake(tau1: float, tau2: float, expected: float) -> None:
    rule = cake(tau1, tau2)
    assert [expected] * 3 == preferred(rule, layer(**WINDOW))
    assert (rule.needs, rule.per_head) == ({"window"}, False)


def test_tappa_paper() -> None:
    rule = tappa_paper()
    assert preferred(rule, layer(**SIMILAR)) == [0.5] * 3
    assert (rule.needs, rule.variant) == ({"similarity"}, PAPER_KV_CACHE)


def test_tappa_paper_with_an_alpha_adds_cake() -> None:
    rule = tappa_paper(10.0, 2.0, 1.0)
    assert preferred(rule, layer(**SIMILAR, **WINDOW)) == [16 + 10 * 0.5] * 3
    assert (rule.needs, rule.variant) == ({"similarity", "window"}, PAPER_KV_CACHE)
    assert preferred(cake(), layer(**WINDOW)) == tappa_paper(0.0).prefer(layer(**SIMILAR, **WINDOW))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 4] * 3),
        ({"exponent": 1.0}, [1 / 2] * 3),
        ({"exponent": 3.0}, [1 / 8] * 3),
        ({"exponent": 0.0}, [1] * 3),
        ({"per_head": True}, [1 / 4, 9 / 16, 1 / 16]),
        ({"per_head": True, "exponent": 1.0}, [1 / 2, 3 / 4, 1 / 4]),
        ({"cake_share": 0.5}, [8 * 1 / 2] * 3),  # 64^(1/2) (1/2)^(2/2)
        ({"cake_share": 1.0}, [64] * 3),
        ({"cake_share": 0.5, "per_head": True}, [8 / 2, 8 * 3 / 4, 8 / 4]),
    ],
)
def test_similarity(options: dict[str, Any], expected: list[float]) -> None:
    rule = similarity(**options)
    assert expected == preferred(rule, layer(**SIMILAR, **WINDOW))
    assert rule.variant == DEFAULT
    assert rule.needs == ({"similarity", "window"} if "cake_share" in options else {"similarity"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_similarity_in_any_variant(variant: Variant) -> None:
    assert similarity(variant=variant).variant == variant


def test_similarity_above_one_by_rounding_is_one() -> None:
    assert similarity(0.5, per_head=True).prefer(layer(similarity=[1.0000001] * 3)) == [0] * 3


def test_similarity_knows_what_it_was_told() -> None:
    with pytest.raises(AssertionError, match="similarity"):
        similarity().prefer(layer(**WINDOW))


def test_retrieval_heads() -> None:
    rule = retrieval_heads()
    assert preferred(rule, layer(predictability=[0.25, 1.0, 0.5])) == [0.75, 0.0, 0.5]
    assert (rule.needs, rule.per_head, rule.binary) == ({"predictability"}, True, True)


BROKEN = [math.nan, math.inf, -math.inf, -7.0]


def prefers(values: list[float], per_head: bool) -> Rule:
    def preference(e: Evidence) -> Tensor:
        return torch.tensor(values)

    return Rule(preference, per_head=per_head)


@pytest.mark.parametrize("bad", BROKEN)
def test_what_is_no_preference_counts_as_none(bad: float) -> None:
    assert prefers([3.0, bad, 6.0], per_head=True).prefer(layer()) == [3, 0, 6]
    assert prefers([3.0, bad, 6.0], per_head=False).prefer(layer()) == [3] * 3


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize(
    "rule",
    [cake(), tappa_paper(), tappa_paper(7.0), similarity(per_head=True), retrieval_heads()],
)
def test_no_evidence_breaks_an_allocation(rule: Rule, bad: float) -> None:
    names = ("similarity", "entropy", "variance", "predictability")
    whole: dict[str, Any] = {name: [bad] * 3 for name in names}
    part: dict[str, Any] = {name: [bad, 0.5, 0.25] for name in names}
    for known in (whole, part):
        preference = rule.prefer(layer(**known))
        assert all(math.isfinite(p) and p >= 0 for p in preference)
        share = tokens(preference, 39, 5, [97] * 3, rule)
        assert 39 - 3 < sum(share) <= 39
        assert min(share) >= 5


def test_allocation_is_the_same_every_time() -> None:
    generator = np.random.default_rng(0)
    preference, capacity = generator.random(61), generator.integers(0, 97, 61)
    first = allocate(uniform(), preference, 1009, 2, capacity)
    assert first.tolist() == allocate(uniform(), preference, 1009, 2, capacity).tolist()
    assert 1009 - 61 < first.sum() <= 1009
