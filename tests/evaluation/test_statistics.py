"""Statistics: against hand calculation, scipy, and properties."""

import math

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test

from tappa.errors import EvaluationError
from tappa.evaluation.statistics import (
    average_of,
    holm,
    mean_of,
    paired_difference,
    stratified_difference,
)


def test_mean_by_hand() -> None:
    found = mean_of([1.0, 2.0, 6.0])  # deviations -2, -1, 3: variance 14 / 2
    assert (found.n, found.mean) == (3, 3.0)
    assert found.error == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(mean_of([5.0]).error)


def test_permutation_by_hand() -> None:
    # differences 2, 3, 1, 2: of 16 sign flips only all + and all - have a mean as far from 0
    found = paired_difference([3, 5, 4, 6], [1, 2, 3, 4])
    assert (found.n, found.mean, found.p) == (4, 2.0, 2 / 16)
    # differences 1, -1: every flip has |mean| >= 0
    assert paired_difference([2, 0], [1, 1]).p == 1.0


def test_bootstrap_by_hand() -> None:
    # differences 0 and 1: the mean of two draws is 0, 1/2 or 1, so the interval is [0, 1]
    found = paired_difference([1, 3], [1, 2])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_against_scipy() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(0.3, 1, 53), rng.normal(0, 1, 53)
    found = paired_difference(x, y, seed=11)

    def mean(d: np.ndarray, axis: int = -1) -> np.ndarray:
        return d.mean(axis)

    flips = permutation_test((x - y,), mean, permutation_type="samples", rng=5)
    assert found.p == pytest.approx(flips.pvalue, abs=0.02)
    interval = bootstrap((x - y,), mean, method="percentile", rng=5).confidence_interval
    assert found.low == pytest.approx(interval.low, abs=0.03)
    assert found.high == pytest.approx(interval.high, abs=0.03)
    assert found == paired_difference(x, y, seed=11)


def test_one_sample_proves_nothing() -> None:
    found = paired_difference([2.0], [1.0])
    assert (found.mean, found.p) == (1, 1)
    assert math.isnan(found.low)


def test_no_difference_is_no_evidence() -> None:
    found = paired_difference([1, 2, 3], [1, 2, 3])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_an_average_counts_tasks_alike() -> None:
    found = average_of([[0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert (found.n, found.mean) == (6, 0.75)
    assert found.error == pytest.approx(0.5 / 2)  # the first has error 1/2, the second 0
    difference = stratified_difference([[1.0, 0.0], [1.0] * 4], [[0.0, 0.0], [0.0] * 4])
    assert difference.mean == 0.75
    # all of 32 flips of the four ones and the one: as far from 0 only if all signs agree
    assert difference.p == pytest.approx(2 / 32, abs=0.01)
    assert (difference.low, difference.high) == (0.5, 1.0)


def test_of_a_single_task_both_ways_agree() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.2, 1, 41), rng.normal(0, 1, 41)
    one, many = paired_difference(x, y), stratified_difference([x, x], [y, y])
    assert many.mean == pytest.approx(one.mean)
    assert many.high - many.low < one.high - one.low  # as if there were twice the samples


@pytest.mark.parametrize(
    ("raw", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5], [0.5]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_by_hand(raw: list[float], corrected: list[float]) -> None:
    assert holm(raw) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=13))
def test_holm_keeps_order_and_never_helps(raw: list[float]) -> None:
    found = holm(raw)
    assert all(1 >= new >= old for new, old in zip(found, raw, strict=True))
    for i in range(len(raw)):
        for j in range(len(raw)):
            assert raw[i] > raw[j] or found[i] <= found[j]


@settings(max_examples=10, phases=[Phase.generate])
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=17))
def test_signs_turn_with_the_pair(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    there, back = paired_difference(x, y), paired_difference(y, x)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low - 1e-9 <= there.mean <= there.high + 1e-9
    assert 0 < there.p <= 1


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_what_is_no_sample_is_refused(values: list) -> None:
    with pytest.raises(EvaluationError, match="expected"):
        mean_of(values)


def test_pairs_must_match() -> None:
    with pytest.raises(EvaluationError, match="3 and 2"):
        paired_difference([1, 2, 3], [1, 2])
