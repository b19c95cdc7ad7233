import math

import pytest
import torch
from torch import Tensor

from tappa.attention_profile import SINK_TOKENS, Attention, attention_rows, persistence
from tappa.capture import LayerView
from tappa.query_model import QueryModel, expected_persistence, mean_change, observed_seasons
from tappa.rope import RotaryChannels

TOKENS, SEASON = 41, 5


def rotary_of(*theta: float) -> RotaryChannels:
    """Half-split channels of these frequencies, and one dimension that is not rotated."""
    pairs = torch.arange(len(theta))
    frequencies = torch.tensor(theta, dtype=torch.float64)
    return RotaryChannels(pairs, pairs + len(theta), frequencies, torch.tensor([2 * len(theta)]))


SLOW = rotary_of(1e-3, 1e-4, 1e-5)
FAST = rotary_of(1.0, 0.3, 0.01)
EVERY = torch.arange(TOKENS).expand(2, TOKENS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constant() -> Tensor:
    """Two heads whose queries never change."""
    return random(2, 1, 7).expand(2, TOKENS, 7).contiguous()


def view_of(rotary: RotaryChannels, queries: Tensor, scale: float = 1.0) -> LayerView:
    """A layer with these queries before RoPE, and random keys."""
    keys = random(1, TOKENS, 7, seed=1)
    at = torch.arange(TOKENS)
    rotated = rotary.rotate(queries, at), rotary.rotate(keys, at)
    return LayerView(0, 0, *rotated, rotary, Attention(scale), query_start=0, key_start=0)


def season(lag: int = SEASON) -> Tensor:
    return torch.full((2,), lag)


def test_model_of_two_steps_by_hand() -> None:
    queries = torch.tensor([[[1.0, 2.0, 0.0, 0.0, 5.0], [3.0, 2.0, 4.0, 0.0, 7.0]]])
    rotary = rotary_of(1.0, 0.1)
    model = QueryModel.of(rotary, queries)
    assert model.mean.tolist() == [[[2.0, 2.0, 2.0, 0.0, 6.0]]]
    # dimensions 0 and 2 have variances 1 and 4, 1 and 3 have none, 4 has 1
    assert model.variance.tolist() == [[5.0, 0.0, 1.0]]
    change = mean_change(rotary, queries, torch.tensor([1]))
    assert change.tolist() == [[4.0 + 16.0, 0.0, 4.0]]
    # 1 - 20 / 10 and 1 - 4 / 2 are -1; a channel that never changes has correlation 1
    assert model.correlation(change).tolist() == [[[-1.0, 1.0, -1.0, 1.0, -1.0]]]


def test_constant_queries_are_perfectly_correlated() -> None:
    model = QueryModel.of(FAST, constant())
    change = mean_change(FAST, constant(), season())
    assert torch.equal(change, torch.zeros(2, 4))
    assert torch.equal(model.correlation(change), torch.ones(2, 1, 7))


def test_no_shift_is_no_change() -> None:
    assert torch.equal(mean_change(FAST, random(2, TOKENS, 7), season(0)), torch.zeros(2, 4))


def test_every_head_has_its_own_shift() -> None:
    queries = random(2, TOKENS, 7)
    both = mean_change(FAST, queries, torch.tensor([3, 11]))
    for head, u in enumerate((3, 11)):
        expected = (queries[head, u:] - queries[head, :-u]).square().mean(0)
        torch.testing.assert_close(both[head], FAST.by_channel(expected))


def test_independent_queries_are_uncorrelated() -> None:
    queries = random(2, 4001, 7)
    change = mean_change(FAST, queries, season(1))
    assert QueryModel.of(FAST, queries).correlation(change).abs().max() < 0.06


def test_correlation_of_a_drawn_process_is_that_of_the_process() -> None:
    steps = random(1, 20_001, 3)
    series = [torch.zeros(1, 3)]
    for step in steps.unbind(1):  # each step keeps 0.8 of the one before
        series.append(0.8 * series[-1] + 0.6 * step)
    queries = torch.stack(series[1:], 1)
    rotary = rotary_of(1.0)
    change = mean_change(rotary, queries, torch.tensor([1]))
    correlation = QueryModel.of(rotary, queries).correlation(change)
    torch.testing.assert_close(correlation, torch.full((1, 1, 3), 0.8), atol=0.03, rtol=0)


def test_draw_without_variance_is_the_rotated_mean() -> None:
    drawn = QueryModel.of(FAST, constant()).draw(EVERY, random(2, TOKENS, 7, seed=3))
    torch.testing.assert_close(drawn, FAST.rotate(constant(), EVERY), atol=1e-5, rtol=0)


def test_draw_has_the_mean_and_the_variance_of_the_queries() -> None:
    scales = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 5.0])
    queries = 2.0 + scales * random(2, 10_007, 7)
    model = QueryModel.of(FAST, queries)
    positions = torch.arange(10_007).expand(2, -1)
    drawn = FAST.unrotate(model.draw(positions, random(2, 10_007, 7, seed=3)), positions)
    again = QueryModel.of(FAST, drawn)
    torch.testing.assert_close(again.mean, model.mean, atol=0.2, rtol=0)
    torch.testing.assert_close(again.variance, model.variance, atol=0, rtol=0.06)


def real_persistence(view: LayerView, rows: Tensor, lag: int) -> Tensor:
    """What `expected_persistence` predicts, from the real queries."""
    weights = attention_rows(view.queries, EVERY, view.keys, view.attention)
    figures = []
    for head, at in zip(weights, rows, strict=True):
        now, step, later = head[at], head[at + 1], head[at + lag]
        shifts = [(step, 0), (step, 1), (later, lag), (later, 0)]
        sums = [persistence(now, then, v) for then, v in shifts]
        figures.append(torch.stack([*sums, now[:, :SINK_TOKENS].sum()]))
    return torch.stack(figures)


ROWS = torch.tensor([[5, 11, 17, 23, 31], [7, 13, 19, 29, 35]])


@pytest.mark.parametrize("rotary", [SLOW, FAST])
def test_constant_queries_are_predicted_exactly(rotary: RotaryChannels) -> None:
    view = view_of(rotary, constant())
    expected = expected_persistence(view, ROWS, season())
    real = real_persistence(view, ROWS, SEASON)
    torch.testing.assert_close(expected, real, atol=1e-4, rtol=1e-4)


def test_constant_queries_and_low_frequencies_persist() -> None:
    # With row t + 1 a key more, out of t + 2: little is lost when t is large
    keep = expected_persistence(view_of(SLOW, constant(), 0.1), ROWS, season())[:, 0]
    assert (keep / ROWS.shape[1] > 0.9).all()
    noise = 3 * random(2, TOKENS, 7)
    lost = expected_persistence(view_of(SLOW, noise), ROWS, season())[:, 0]
    assert (lost < keep - 1).all()


def test_nearly_constant_queries_are_predicted_nearly() -> None:
    queries = constant() + 0.05 * random(2, TOKENS, 7, seed=5)
    view = view_of(SLOW, queries)
    expected = expected_persistence(view, ROWS, season())
    real = real_persistence(view, ROWS, SEASON)
    torch.testing.assert_close(expected, real, atol=0.5, rtol=0)  # of 5 rows


def test_expectations_are_the_same_at_every_call() -> None:
    queries = random(2, TOKENS, 7)
    view = view_of(FAST, queries)
    first, second = (expected_persistence(view, ROWS, season()) for _ in range(2))
    assert torch.equal(first, second)
    assert (first >= 0).all()
    assert (first <= ROWS.shape[1] + 1e-4).all()


def test_observed_seasons_are_those_of_the_real_attention() -> None:
    view = view_of(FAST, random(2, TOKENS, 7))
    observed = observed_seasons(view, ROWS, season())
    real = real_persistence(view, ROWS, SEASON)
    torch.testing.assert_close(observed[:, :2], real[:, 2:4])
    weights = attention_rows(view.queries, EVERY, view.keys, view.attention)
    for head, at in enumerate(ROWS):
        now = weights[head, at]
        assert float(observed[head, 2]) == pytest.approx(float(persistence(now, now, SEASON)))


def test_a_period_of_the_rotation_is_a_season() -> None:
    # One channel, five tokens to the turn: constant queries see the same angles again
    rotary = rotary_of(2 * math.pi / SEASON)
    q = torch.tensor([8.0, 0.0, 0.0]).expand(2, TOKENS, 3).contiguous()
    keys = torch.tensor([1.0, 0.0, 0.0]).expand(1, TOKENS, 3).contiguous()
    at = torch.arange(TOKENS)
    rotated = rotary.rotate(q, at), rotary.rotate(keys, at)
    view = LayerView(0, 0, *rotated, rotary, Attention(1.0, window=SEASON), 0, 0)
    rows = torch.tensor([[7, 11, 13], [17, 23, 29]])
    observed = observed_seasons(view, rows, season())
    assert observed[:, 0].tolist() == pytest.approx([3, 3], rel=1e-4)  # the same row, moved by 5
    assert observed[:, 1].tolist() == pytest.approx([0, 0], abs=1e-4)  # windows do not meet
