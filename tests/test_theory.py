import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa.rope import RotaryChannels
from tappa.theory import (
    BINS,
    BOUNDS,
    BoundCheck,
    Layer,
    Points,
    check_bounds,
    jump_bound,
    median_tightness,
    residual_bound,
    shift_bound,
    spread_rows,
)

SEEDS = st.integers(0, 2**31)


def rotary_of(theta: list[float], rest: int = 0) -> RotaryChannels:
    """Half-split channels of these frequencies, and `rest` dimensions that are not rotated."""
    pairs = torch.arange(len(theta))
    frequencies = torch.tensor(theta, dtype=torch.float64)
    unrotated = torch.arange(2 * len(theta), 2 * len(theta) + rest)
    return RotaryChannels(pairs, pairs + len(theta), frequencies, unrotated)


MIXED = rotary_of([1.0, 0.3, 0.007], rest=1)


def layer_of(rotary: RotaryChannels, queries: Tensor, keys: Tensor, scale: float = 1.0) -> Layer:
    """A layer with these vectors before RoPE."""
    rotated = [rotary.rotate(x, torch.arange(x.shape[1])) for x in (queries, keys)]
    return Layer(rotated[0], queries, rotated[1], keys, rotary, scale)


def random_layer(steps: int = 29, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(6, steps, 7, generator=generator)
    keys = torch.randn(3, steps, 7, generator=generator)
    return layer_of(MIXED, queries, keys, scale=0.37)


def full(heads: int, value: int) -> Tensor:
    return torch.full((heads,), value)


def check(layer: Layer, season: int = 5, channel: int = 1) -> dict[str, BoundCheck]:
    heads = len(layer.queries)
    return dict(check_bounds(layer, full(heads, season), full(heads, channel), rows=11, keys=7))


def points(layer: Layer, row: int, key: int) -> Points:
    heads = len(layer.queries)
    return Points.of(layer, full(heads, row)[:, None], full(heads, key)[:, None, None])


@settings(deadline=None)
@given(SEEDS, st.integers(0, 12), st.integers(0, 12), st.integers(1, 13), st.data())
def test_shift_bound_holds(seed: int, row: int, key: int, lag: int, data) -> None:
    shifts = [(1, 0), (1, 1), (lag, lag), (lag, 0), (0, lag)]
    u, v = data.draw(st.sampled_from(shifts))
    layer = random_layer(seed=seed)
    now, then = points(layer, row, key), points(layer, row + u, key + v)
    actual, bound = shift_bound(MIXED, now, then, full(6, v - u))
    assert (actual <= bound + now.slack() + then.slack()).all()
    torch.testing.assert_close(actual, (then.logits() - now.logits()).abs())


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 29), st.integers(1, 7), st.integers(0, 2))
def test_no_bound_is_violated(seed: int, steps: int, season: int, channel: int) -> None:
    for name, result in check(random_layer(steps, seed), season, channel).items():
        assert (result.checked > 0).all(), name
        assert (result.violations == 0).all(), name


def test_every_bound_is_checked() -> None:
    assert set(check(random_layer())) == set(BOUNDS)
    assert set(check(random_layer(), season=0)) == {"vertical", "sequential", "jump", "residual"}
    assert set(check(random_layer(6), season=5)) == set(BOUNDS)
    assert set(check(random_layer(5), season=5)) == {"vertical", "sequential", "jump", "residual"}


def test_without_rope_there_is_no_dominant_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, 3, generator=generator)
    results = check(layer_of(rotary_of([], rest=3), x, x), channel=0)
    assert "residual" not in results
    assert all((result.violations == 0).all() for result in results.values())


def scaled(layer: Layer, factor: float) -> Layer:
    assert layer.queries_before is not None
    return replace(layer, queries_before=factor * layer.queries_before)


@pytest.mark.parametrize("start", [0, 19])
def test_sampled_vectors_can_be_turned_back(start: int) -> None:
    """Without all vectors before RoPE, those of the points are the same."""
    generator = torch.Generator().manual_seed(start)
    queries, keys = (torch.randn(heads, 29, 7, generator=generator) for heads in (6, 3))
    at = torch.arange(29) + start
    rotated = MIXED.rotate(queries, at), MIXED.rotate(keys, at)
    layer = Layer(rotated[0], queries, rotated[1], keys, MIXED, 0.37, start, start)
    bare = replace(layer, queries_before=None, keys_before=None)
    given, found = (vars(points(x, 11, 5)).values() for x in (layer, bare))
    for whole, turned in zip(given, found, strict=True):
        torch.testing.assert_close(turned, whole, atol=1e-5, rtol=1e-5)
    assert check(bare).keys() == check(layer).keys()
    assert all((result.violations == 0).all() for result in check(bare).values())


@pytest.mark.parametrize(
    ("factor", "names"),
    [
        (0.01, {"vertical", "sequential", "seasonal", "seasonal_rows", "seasonal_columns"}),
        (100, {"jump"}),  # a lower bound
    ],
)
def test_wrong_queries_are_reported(factor: float, names: set[str]) -> None:
    results = check(scaled(random_layer(), factor))
    assert {name for name, r in results.items() if (r.violations > 0).all()} == names
    assert {name for name, r in results.items() if (r.violations > 0).any()} == names


def test_not_a_number_is_a_violation() -> None:
    layer = random_layer()
    queries = layer.queries.clone()
    queries[2, 0] = torch.nan
    results = check(replace(layer, queries=queries))
    assert results["vertical"].violations.tolist()[2] > 0
    assert results["vertical"].violations.tolist()[:2] == [0, 0]


def test_nothing_changes_for_constant_queries_and_keys() -> None:
    layer = layer_of(rotary_of([1.0, 0.1]), torch.ones(1, 11, 4), torch.ones(1, 11, 4))
    now, then = points(layer, 7, 2), points(layer, 8, 3)
    actual, bound = shift_bound(layer.rotary, now, then, full(1, 0))
    assert float(actual) == pytest.approx(0, abs=1e-5)
    assert float(bound) == 0


def test_a_tight_vertical_bound() -> None:
    # A quarter turn per token; from q to k 135 degrees, one step later 45: -cos(45) to cos(45)
    root = math.sqrt(0.5)
    queries = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    keys = torch.tensor([[[-root, root], [-root, root]]])
    layer = layer_of(rotary_of([math.pi / 2]), queries, keys, scale=3.0)
    now, then = points(layer, 0, 0), points(layer, 1, 0)
    assert float(now.logits()) == pytest.approx(-3 * root)
    assert float(then.logits()) == pytest.approx(3 * root)
    actual, bound = shift_bound(layer.rotary, now, then, full(1, -1))
    assert float(actual) == pytest.approx(3 * math.sqrt(2))
    assert float(bound) == pytest.approx(3 * math.sqrt(2))


def test_a_tight_sequential_bound() -> None:
    # Query and key of one direction: 2 * 3 becomes 5 * 7, and 29 = (5 - 2) * 7 + 2 * (7 - 3)
    queries, keys = (
        torch.tensor([[[2.0, 0.0], [5.0, 0.0]]]),
        torch.tensor([[[3.0, 0.0], [7.0, 0.0]]]),
    )
    layer = layer_of(rotary_of([0.3]), queries, keys)
    now, then = points(layer, 0, 0), points(layer, 1, 1)
    actual, bound = shift_bound(layer.rotary, now, then, full(1, 0))
    assert float(actual) == pytest.approx(29)
    assert float(bound) == pytest.approx(29)


def test_a_shift_by_a_whole_period_changes_nothing() -> None:
    layer = layer_of(rotary_of([2 * math.pi / 5]), torch.ones(1, 11, 2), torch.ones(1, 11, 2))
    actual, bound = shift_bound(layer.rotary, points(layer, 7, 1), points(layer, 7, 6), full(1, 5))
    assert float(actual) == pytest.approx(0, abs=1e-5)
    assert float(bound) == pytest.approx(0, abs=1e-5)


def test_a_tight_jump_bound() -> None:
    # Without rotation a step of 5 along a key of length 7 changes the logit by 35
    queries, keys = torch.tensor([[[2.0, 0.0], [7.0, 0.0]]]), torch.tensor([[[7.0, 0.0]]])
    layer = layer_of(rotary_of([0.0]), queries, keys)
    now, then = points(layer, 0, 0), points(layer, 1, 0)
    actual, bound = jump_bound(layer.rotary, now, then, torch.tensor([[0]]))
    assert float(actual) == float(bound) == 35
    # Half a turn per token takes off chord 2 * |q| |k| = 28, and 7 * 7 + 2 * 7 = 63 is above 7
    layer = layer_of(rotary_of([math.pi]), queries, keys)
    now, then = points(layer, 0, 0), points(layer, 1, 0)
    actual, bound = jump_bound(layer.rotary, now, then, torch.tensor([[0]]))
    assert float(actual) == pytest.approx(63)
    assert float(bound) == pytest.approx(35 - 28)


def test_residual_by_hand() -> None:
    # Channel 0 gives 3 * 5 to the logit at distance 0, channel 1 the rest: 2 * 7
    queries, keys = torch.tensor([[[3.0, 2.0, 0.0, 0.0]]]), torch.tensor([[[5.0, 7.0, 0.0, 0.0]]])
    layer = layer_of(rotary_of([1.0, 0.1]), queries, keys)
    now = points(layer, 0, 0)
    assert [float(x) for x in residual_bound(layer.rotary, now, full(1, 0))] == [14, 14]
    assert [float(x) for x in residual_bound(layer.rotary, now, full(1, 1))] == [15, 15]


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2), st.integers(0, 28), st.integers(0, 28))
def test_residual_bound_holds(seed: int, channel: int, row: int, key: int) -> None:
    now = points(random_layer(seed=seed), row, key)
    actual, bound = residual_bound(MIXED, now, full(6, channel))
    assert (actual <= bound + 2 * now.slack()).all()


def test_points_share_keys_between_heads_of_a_group() -> None:
    layer = random_layer()
    now = points(layer, 13, 2)
    for head in range(6):
        expected = 0.37 * layer.queries[head, 13] @ layer.keys[head // 2, 2]
        assert float(now.logits()[head]) == pytest.approx(float(expected), abs=1e-5)


def test_bound_check_counts() -> None:
    lower = torch.tensor([[[1.0, 2.0, 5.0, 0.0, math.nan]], [[1.0, 1.0, 1.0, 1.0, 1.0]]])
    upper = torch.tensor([[[2.0, 2.0, 4.0, 3.0, 1.0]], [[4.0, 4.0, 4.0, 2.0**99, 0.95]]])
    result = BoundCheck.of(lower, upper, torch.full((2, 1, 5), 0.1))
    assert result.checked.tolist() == [5, 5]
    assert result.violations.tolist() == [2, 0]  # 5 > 4 and NaN; 1 > 0.95 is within the slack
    assert result.tightness.sum(1).tolist() == [3, 5]  # neither the 0 nor the NaN
    assert result.tightness[0, [0, 4]].tolist() == [2, 1]  # 2 / 2 and 4 / 5, then 2 / 1
    assert result.tightness[1, [0, 8, BINS - 1]].tolist() == [1, 3, 1]


def test_nothing_checked() -> None:
    none = BoundCheck.none(3)
    assert none.checked.tolist() == none.violations.tolist() == [0, 0, 0]
    assert none.tightness.shape == (3, BINS)


def histogram(**counts: float) -> Tensor:
    bins = torch.zeros(BINS, dtype=torch.float64)
    for name, count in counts.items():
        bins[int(name[3:])] = count
    return bins


def test_median_tightness() -> None:
    assert math.isnan(median_tightness(histogram()))
    assert median_tightness(histogram(bin4=6)) == pytest.approx(2 ** (4.5 / 4))
    assert median_tightness(histogram(bin0=3, bin8=1)) == pytest.approx(2 ** (2 / 3 / 4))
    assert median_tightness(histogram(bin0=1, bin8=3)) == pytest.approx(2 ** ((8 + 1 / 3) / 4))


@given(st.integers(1, 101), st.integers(1, 13))
def test_spread_rows(steps: int, count: int) -> None:
    [rows] = spread_rows(torch.tensor([steps]), count).tolist()
    assert len(rows) == min(count, steps)
    assert len(set(rows)) == len(rows)
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == steps - 1 or len(rows) == 1


@settings(deadline=None)
@given(st.integers(2, 29), st.integers(0, 7), st.integers(1, 5))
def test_sampled_keys_exist_and_are_not_later(steps: int, v: int, count: int) -> None:
    layer, rows = random_layer(steps), torch.arange(steps).expand(6, steps)
    keys = layer.sample_keys(rows, count, full(6, v))
    assert keys.shape == (6, steps, count)
    assert (keys >= 0).all()
    assert (keys <= rows[..., None]).all()
    assert (keys + v < steps).all() or v >= steps
    assert keys[0, :, 0].tolist() == [0] * steps
