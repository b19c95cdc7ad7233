"""The bounds hold on random heads, are tight where they should be, and can fail."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tappa.rope import RotaryChannels
from tappa.theory import BOUNDS, Layer, check_bounds, median_tightness


def rotary(dim: int = 10, base: float = 50.0) -> RotaryChannels:
    half = dim // 2
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    at = torch.arange(half)
    return RotaryChannels(at, at + half, theta, torch.arange(0))


def layer(queries: torch.Tensor, keys: torch.Tensor, scale: float = 0.3) -> Layer:
    """A layer from vectors before RoPE."""
    turn, at = rotary(queries.shape[-1]), torch.arange(queries.shape[1])
    return Layer(turn.rotate(queries, at), queries, turn.rotate(keys, at), keys, turn, scale)


@given(st.integers(0, 10**6), st.integers(1, 13))
@settings(max_examples=20, deadline=None)
def test_no_bound_is_violated(seed: int, season: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(6, 41, 10, generator=generator)
    keys = torch.randn(3, 41, 10, generator=generator) * 3
    seasons = torch.full((6,), season)
    checks = dict(check_bounds(layer(queries, keys), seasons, torch.arange(6) % 5, 17, 41))
    assert set(checks) == set(BOUNDS)
    assert all(int(check.violations.sum()) == 0 for check in checks.values())
    assert all(int(check.checked.sum()) == 6 * 17 * 41 for check in checks.values())


def test_a_wrong_layer_is_found_out() -> None:
    good = layer(torch.randn(2, 31, 10), torch.randn(1, 31, 10))
    shrunk = Layer(
        *(good.queries, good.queries_before / 50, good.keys, good.keys_before / 50),
        *(good.rotary, good.scale),
    )
    season = torch.tensor([3, 3])
    checks = dict(check_bounds(shrunk, season, torch.tensor([0, 1]), 17, 31))
    assert int(checks["vertical"].violations.sum()) > 0
    assert int(checks["sequential"].violations.sum()) > 0


def test_constant_queries_and_keys_do_not_change_along_the_diagonal() -> None:
    """Theorem 5.2 with no change: both sides are 0, so nothing is counted as tight or loose."""
    same = layer(torch.ones(2, 23, 10), torch.ones(1, 23, 10))
    checks = dict(check_bounds(same, torch.tensor([5, 5]), torch.tensor([0, 0]), 11, 23))
    assert int(checks["sequential"].tightness.sum()) == 0
    assert int(checks["sequential"].violations.sum()) == 0
    assert int(checks["vertical"].tightness.sum()) > 0


def test_median_of_a_histogram() -> None:
    """Four pairs in the bin from 2 to 2^1.25: the median is in its middle."""
    histogram = torch.zeros(48)
    histogram[4] = 4
    assert median_tightness(histogram) == 2 ** ((4 + 0.5) / 4)
    assert median_tightness(torch.zeros(48)) != median_tightness(torch.zeros(48))  # NaN
