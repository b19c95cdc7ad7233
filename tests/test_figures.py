from dataclasses import replace

import numpy as np
import pytest

import tappa
from tappa.figures import Figures, channel_of, head_figures, kv_head, lag_period, lag_profile
from tappa.layer_statistics import LayerStatistics
from tiny import tiny_model, tiny_tokenizer

LAGS = np.arange(512)
COUNTS = (512.0 - LAGS).clip(0)  # pairs at each distance in a prompt of 512 tokens


def wave(period: float, phase: float = 0.7) -> np.ndarray:
    return np.cos(2 * np.pi * LAGS / period + phase)


@pytest.mark.parametrize("period", [2.5, 6.2832, 14.9, 54.41, 110.0])
def test_lag_period_of_a_cosine(period: float) -> None:
    found, strength = lag_period(wave(period), COUNTS)
    assert found == pytest.approx(period, rel=0.01)
    assert 0.95 < strength <= 1


@pytest.mark.parametrize("period", [14.9, 54.41])
@pytest.mark.parametrize("trend", [0.02 * LAGS, -3e-5 * LAGS**2 + 0.01 * LAGS + 5])
def test_lag_period_does_not_mind_a_trend(period: float, trend: np.ndarray) -> None:
    found, strength = lag_period(wave(period) + trend, COUNTS)
    assert found == pytest.approx(period, rel=0.01)
    assert strength > 0.95


def test_lag_period_takes_the_stronger_of_two_waves() -> None:
    found, strength = lag_period(wave(14.9) + 2 * wave(54.41), COUNTS)
    assert found == pytest.approx(54.41, rel=0.02)
    assert strength == pytest.approx(4 / 5, abs=0.03)


def test_noise_has_little_periodicity() -> None:
    noise = np.random.default_rng(0).normal(size=512)
    assert lag_period(noise, COUNTS)[1] < 0.15
    assert lag_period(wave(14.9) + noise, COUNTS)[1] == pytest.approx(1 / 3, abs=0.1)


def test_lag_period_leaves_out_distances_with_few_pairs() -> None:
    few = np.where(COUNTS < 128, 1e6, wave(14.9))
    assert lag_period(few, COUNTS) == lag_period(wave(14.9), COUNTS)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -7.1])
def test_a_flat_profile_has_no_periodicity(value: float) -> None:
    assert lag_period(np.full(512, value), COUNTS)[1] < 0.1  # of rounding errors, if of anything


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_short_profile_has_no_period(steps: int) -> None:
    assert lag_period(wave(3.0)[:steps], np.ones(steps)) == (None, 0.0)


def test_a_profile_that_is_not_finite_has_no_period() -> None:
    mean = wave(14.9)
    mean[20] = np.nan
    assert lag_period(mean, COUNTS) == (None, 0.0)


def test_lag_profile_is_a_mean_over_pairs() -> None:
    sums = {
        "lag_attention": np.array([[1.0, 1.0, 1.0, 0.0], [3.0, 4.0, 5.0, 0.0]]),
        "lag_logits": np.array([[6.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        "lag_counts": np.array([3, 2, 1, 0]),
    }
    mean, counts = lag_profile(sums, 1)
    np.testing.assert_array_equal(mean, [1, 2, 5, 0])
    np.testing.assert_array_equal(counts, [3, 2, 1, 0])
    np.testing.assert_array_equal(lag_profile(sums, 0, "lag_logits")[0], [2, 0, -1, 0])


def test_query_heads_share_kv_heads_in_blocks() -> None:
    sums = {"q_cosines_pre_all_prompt": np.zeros(6), "k_cosines_pre_all_prompt": np.zeros(3)}
    assert [kv_head(sums, h) for h in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def layer() -> LayerStatistics:
    """The sums of one layer: 6 heads, 3 KV heads, 5 channels."""
    model = tiny_model("llama", num_hidden_layers=1)
    text = "It is a truth universally acknowledged"
    return tappa.analyze(model, tiny_tokenizer(), text).layers[0]


def changed(layer: LayerStatistics, **sums: np.ndarray) -> list[Figures]:
    return head_figures(replace(layer, sums={**layer.sums, **sums}))


def test_dominant_channel_by_hand(layer: LayerStatistics) -> None:
    energy = np.tile([1.0, 2.0, 5.0, 1.0, 1.0], (6, 1))
    align = np.zeros((6, 5, 2))
    align[:, 2] = [0.0, 2.5]
    head = changed(replace(layer, theta=[1.0, 0.5, 0.25, 0.1, 0.05]), energy=energy, align=align)[3]
    assert (head["layer"], head["head"], head["kv_head"]) == (0, 3, 1)
    assert (head["dominant_channel"], head["dominant_share"]) == (2, 0.5)
    assert head["frequency"] == 0.25
    assert head["period"] == pytest.approx(8 * np.pi)
    assert head["angle"] == pytest.approx(np.pi / 2)
    assert head["alignment"] == 0.5
    assert head["unrotated_share"] == 0


def test_a_channel_that_is_not_rotated_counts_but_cannot_dominate(layer: LayerStatistics) -> None:
    energy = np.tile([1.0, 2.0, 5.0], (6, 1))
    head = changed(replace(layer, theta=[1.0, 0.0]), energy=energy, align=np.zeros((6, 2, 2)))[0]
    assert (head["dominant_channel"], head["dominant_share"]) == (1, 0.25)
    assert head["period"] is None
    assert head["unrotated_share"] == 0.625


def test_a_fast_channel_gives_the_expected_period_whatever_the_dominant_one(
    layer: LayerStatistics,
) -> None:
    """The slow channel has most energy and never turns; the fast one has a period of 7."""
    energy, align = np.tile([99.0, 1.0], (6, 1)), np.zeros((6, 2, 2))
    align[:, 0], align[:, 1] = [50.0, 0.0], [0.3, -0.4]
    counts = {"lag_counts": np.full(1024, 3)}
    slow = replace(layer, theta=[1e-6, 2 * np.pi / 7])
    head = changed(slow, energy=energy, align=align, **counts)[2]
    assert head["dominant_channel"] == 0
    assert head["expected_period"] == pytest.approx(7, abs=1e-3)
    assert head["expected_period_strength"] > 0.99


def test_the_nearest_channel_of_a_period() -> None:
    theta = [2 * np.pi / 3, 2 * np.pi / 11, 2 * np.pi / 101, 0.0]
    assert [channel_of(tokens, theta) for tokens in (2.0, 9.0, 13.0, 999.0)] == [0, 1, 1, 2]
    assert channel_of(None, theta) is channel_of(5.0, [0.0]) is channel_of(5.0, []) is None


def test_a_flat_profile_has_no_period() -> None:
    assert lag_period(np.full(101, 0.1), np.full(101, 7.0)) == (None, 0.0)


def test_a_layer_without_rotation_has_no_channel(layer: LayerStatistics) -> None:
    head = changed(replace(layer, theta=[]), energy=np.ones((6, 5)), align=np.zeros((6, 0, 2)))[0]
    assert head["dominant_channel"] is head["dominant_share"] is head["period"] is None
    assert head["unrotated_share"] == 1
    assert head["expected_period_strength"] == 0


def test_similarity_is_the_mean_over_pairs_and_keys_come_from_the_kv_head(
    layer: LayerStatistics,
) -> None:
    heads = changed(
        layer,
        q_cosines_pre_all_prompt=np.arange(6.0),
        q_pairs_pre_all_prompt=np.array(10),
        k_cosines_pre_all_prompt=np.array([1.0, 2.0, 3.0]),
        k_pairs_pre_all_prompt=np.array(4),
        q_pairs_post_adjacent_window=np.array(0),
    )
    assert [h["q_similarity"] for h in heads] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [h["k_similarity"] for h in heads] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert all(h["q_similarity"] == h["q_similarity_pre_all_prompt"] for h in heads)
    assert all(h["q_similarity_post_adjacent_window"] is None for h in heads)


def test_attention_figures_by_hand(layer: LayerStatistics) -> None:
    halves = {name: np.full(6, 5.0) for name in ("sink_mass", "heavy_mass", "entropy")}
    votes = np.zeros((6, 1024), dtype=int)
    votes[:, 11] = 3
    head = changed(
        layer,
        **halves,
        rows=np.array(10),
        sink_rows=np.array(8),
        pairs=np.array(9),
        vertical=np.full(6, 4.5),
        diagonal=np.full(6, 2.25),
        season_votes=votes,
        seasonal_rows=np.full(6, 4),
        observed=np.tile([3.0, 2.0, 1.0], (6, 1)),
    )[5]
    assert (head["sink_mass"], head["heavy_mass"], head["entropy"]) == (0.625, 0.5, 0.5)
    assert (head["vertical"], head["diagonal"], head["season"]) == (0.5, 0.25, 11)
    assert [head[n] for n in ("seasonal", "seasonal_rows", "seasonal_columns")] == [0.75, 0.5, 0.25]
    assert head["predictability"] == 0.75


def test_shares_are_shares(layer: LayerStatistics) -> None:
    shares: tuple[str, ...]
    shares = ("sink_mass", "heavy_mass", "vertical", "diagonal", "predictability", "dominant_share")
    shares += ("expected_vertical", "expected_diagonal", "expected_sink_mass", "alignment")
    for head in head_figures(layer):
        assert all(0 <= head[name] <= 1 + 1e-6 for name in shares)
        assert 0 <= head["period_strength"] <= 1
