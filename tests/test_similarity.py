import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tappa.similarity import (
    VARIANTS,
    SelfSimilarity,
    Variant,
    autocorrelation,
    lag_counts,
    lag_sums,
    self_similarity,
)

STEPS, DIMS = st.integers(2, 23), st.integers(1, 7)
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit @ unit.mT


def naive(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of different steps, from the full matrix."""
    steps = x.shape[-2]
    off_diagonal = cosines(x).masked_fill(torch.eye(steps, dtype=torch.bool), 0.0)
    return off_diagonal.sum((-1, -2)) / (steps * (steps - 1))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1, 0], [0, 2], [3, 0]], 1 / 3),  # cosines 0, 1, 0
        ([[1, 2], [2, 4], [5, 10]], 1.0),
        ([[1, 0], [-3, 0]], -1.0),
        ([[1, 0], [1, 1]], math.sqrt(0.5)),
        ([[1, 0], [-1, math.sqrt(3)], [-1, -math.sqrt(3)]], -1 / 2),  # the least for 3 steps
        ([[1, 0], [0, 0], [2, 0]], 1 / 3),  # a zero vector is orthogonal to everything
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_self_similarity_by_hand(vectors: list, expected: float) -> None:
    x = torch.tensor(vectors, dtype=torch.float32)
    assert float(self_similarity(x)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_self_similarity_needs_two_steps(steps: int) -> None:
    assert self_similarity(torch.ones(3, steps, 5)).isnan().all()


@settings(deadline=None)
@given(STEPS, DIMS, SEEDS)
def test_self_similarity_is_the_mean_of_the_full_matrix(steps: int, dim: int, seed: int) -> None:
    x = random(3, steps, dim, seed=seed)
    torch.testing.assert_close(self_similarity(x), naive(x), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(STEPS, DIMS, SEEDS)
def test_self_similarity_is_between_its_bounds(steps: int, dim: int, seed: int) -> None:
    value = float(self_similarity(random(steps, dim, seed=seed)))
    assert -1 / (steps - 1) - 1e-6 <= value <= 1 + 1e-6


@given(st.floats(1e-3, 1e3))
def test_self_similarity_ignores_lengths(factor: float) -> None:
    x, factors = random(7, 5), torch.tensor([factor] + 6 * [1.0])[:, None]
    torch.testing.assert_close(self_similarity(factors * x), self_similarity(x))


def test_self_similarity_of_more_steps_than_one_block() -> None:
    x = random(1031, 3)
    torch.testing.assert_close(self_similarity(x), naive(x), atol=1e-7, rtol=0)


def naive_sums(x: Tensor, variant: Variant, window: int) -> tuple[Tensor, int]:
    x = x[:, -window:] if variant.extent == "window" else x
    steps = x.shape[1]
    pairs = [(s, t) for s in range(steps) for t in range(steps) if s != t]
    if variant.pairs == "adjacent":
        pairs = [(t, t + 1) for t in range(steps - 1)]
    matrix = cosines(x)
    zero = torch.zeros(len(x), dtype=torch.float64)
    return sum((matrix[:, s, t] for s, t in pairs), zero), len(pairs)


def measure(pre: Tensor, post: Tensor, sizes: list[int], window: int):
    meter = SelfSimilarity(window)
    for a, b in zip(pre.split(sizes, 1), post.split(sizes, 1), strict=True):
        meter.add(a, b)
    return meter.sums()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 11), SEEDS)
def test_every_variant_in_any_chunks(sizes: list[int], window: int, seed: int) -> None:
    both = random(2, 3, sum(sizes), 5, seed=seed)
    sums = measure(both[0], both[1], sizes, window)
    assert set(sums) == set(VARIANTS)
    for variant, (total, count) in sums.items():
        x = both[0 if variant.space == "pre" else 1]
        expected, pairs = naive_sums(x, variant, window)
        assert count == pairs
        torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=0)


def test_variants_by_hand() -> None:
    # steps east, east, north, north: only the middle pair of neighbours is orthogonal
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 5.0]]])
    sums = {v: (float(s), n) for v, (s, n) in measure(x, x, [4], 3).items()}
    assert sums[Variant("pre", "all", "prompt")] == pytest.approx((4, 12))
    assert sums[Variant("pre", "adjacent", "prompt")] == pytest.approx((2, 3))
    assert sums[Variant("post", "all", "window")] == pytest.approx((2, 6))
    assert sums[Variant("post", "adjacent", "window")] == pytest.approx((1, 2))


def test_default_variant_agrees_with_self_similarity() -> None:
    x = random(3, 13, 5)
    total, count = measure(x, x, [13], 32)[Variant()]
    torch.testing.assert_close(total / count, self_similarity(x))


def test_sums_add_up_over_prompts() -> None:
    prompts = [random(3, steps, 5, seed=steps) for steps in (7, 13)]
    parts = [measure(x, x, [x.shape[1]], 32)[Variant()] for x in prompts]
    mean = sum(total for total, _ in parts) / sum(count for _, count in parts)
    weights = torch.tensor([7 * 6, 13 * 12])
    expected = sum(w * naive(x) for w, x in zip(weights, prompts, strict=True)) / weights.sum()
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=0)


def test_one_step_has_no_pairs() -> None:
    x = random(3, 1, 5)
    for total, count in measure(x, x, [1], 32).values():
        assert count == 0
        assert float(total.double().abs().max()) < 1e-6


def test_nothing_added_gives_no_sums() -> None:
    assert SelfSimilarity().sums() == {}


def test_variant_names() -> None:
    assert str(Variant()) == "pre_all_prompt"
    assert len(set(map(str, VARIANTS))) == 8


def naive_lag_sum(later: Tensor, earlier: Tensor, lag: int, start: int) -> tuple[float, int]:
    terms = [
        float(later[t] @ earlier[start + t - lag])
        for t in range(len(later))
        if 0 <= start + t - lag < len(earlier)
    ]
    return sum(terms), len(terms)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 11), st.integers(0, 7), st.integers(0, 5), st.integers(1, 29), SEEDS)
def test_lag_sums_and_counts(steps: int, start: int, after: int, lags: int, seed: int) -> None:
    later = random(2, steps, 3, seed=seed)
    earlier = random(2, start + steps + after, 3, seed=seed + 1)
    sums, counts = (
        lag_sums(later, earlier, lags, start),
        lag_counts(steps, len(earlier[0]), lags, start),
    )
    for lag in range(lags):
        for head in range(2):
            expected, count = naive_lag_sum(later[head], earlier[head], lag, start)
            assert float(sums[head, lag]) == pytest.approx(expected, abs=1e-4)
            assert int(counts[lag]) == count


def test_lag_sums_by_hand() -> None:
    x = torch.tensor([[[1.0], [2.0], [5.0]]])
    torch.testing.assert_close(lag_sums(x, x, 4), torch.tensor([[30.0, 12.0, 5.0, 0.0]]))
    assert lag_counts(3, 3, 4).tolist() == [3, 2, 1, 0]
    later = x[:, 1:]  # the same rows but the first
    torch.testing.assert_close(lag_sums(later, x, 3, start=1), torch.tensor([[29.0, 12.0, 5.0]]))
    assert lag_counts(2, 3, 3, start=1).tolist() == [2, 2, 1]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 13), st.integers(1, 17), SEEDS)
def test_autocorrelation_is_the_mean_cosine_at_a_lag(steps: int, lags: int, seed: int) -> None:
    x = random(2, steps, 3, seed=seed)
    curve, matrix = autocorrelation(normalize(x, dim=-1), lags), cosines(x)
    for lag in range(min(lags, steps)):
        expected = matrix.diagonal(-lag, 1, 2).mean(-1).float()
        torch.testing.assert_close(curve[:, lag], expected, atol=1e-5, rtol=0)
    assert curve[:, steps:].isnan().all()


def test_autocorrelation_of_a_periodic_signal() -> None:
    turn = torch.arange(20) * 2 * math.pi / 5  # five steps to the turn
    curve = autocorrelation(torch.stack([turn.cos(), turn.sin()], -1)[None], 11)[0]
    expected = (torch.arange(11) * 2 * math.pi / 5).cos()
    torch.testing.assert_close(curve, expected, atol=1e-5, rtol=0)
