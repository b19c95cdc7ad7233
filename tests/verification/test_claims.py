"""Bounds, made-up heads, observations and sensitivity, against naive computations."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import tappa
from tappa.analysis import Analysis
from tappa.cache_argument import with_cache
from tappa.capture import LayerView, prefill
from tappa.compression import compressed, record
from tappa.theory import BOUNDS
from tappa.verification.bounds import AttentionBound, attention_changes, logit_bounds
from tappa.verification.constructed import (
    NOISE,
    PATTERNS,
    Constructed,
    check_constructed,
    construct,
    label,
)
from tappa.verification.observations import auroc, observe, stability
from tappa.verification.sensitivity import KEPT, NEXT, correlate, measure_sensitivity
from tiny import tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. "


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return tappa.analyze(tiny_model("llama"), tiny_tokenizer(), TEXT * 3, tokens=211)


def test_logit_bounds_are_those_of_the_analysis(analysis: Analysis) -> None:
    found = {bound.name: bound for bound in logit_bounds(analysis)}
    assert list(found) == list(BOUNDS)
    assert sum(bound.checked for bound in found.values()) == analysis.summary()["bounds_checked"]
    assert {bound.verdict for bound in found.values()} == {"pass"}
    assert found["vertical"].tightness > 1
    broken = analysis.layers[1].sums["violations"]
    broken[2, BOUNDS.index("residual")] = 1
    try:
        again = {bound.name: bound.verdict for bound in logit_bounds(analysis)}
        assert again["residual"] == "fail"
        assert again["vertical"] == "pass"
    finally:
        broken[2, BOUNDS.index("residual")] = 0


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "qwen2"])
def test_attention_changes_are_the_naive_ones_and_bounded(kind: str) -> None:
    """Row by row from full attention; also where a sliding window drops a key."""
    views: list[LayerView] = []
    ids = torch.randint(3, 90, (1, 37), generator=torch.Generator().manual_seed(0))
    prefill(tiny_model(kind), ids, views.append)
    for view in views:
        actual, bound = attention_changes(view, rows=100)
        steps = view.queries.shape[1]
        keys = view.keys.double().repeat_interleave(2, 0)
        logits = view.attention.logits(view.queries.double(), keys.mT)
        at = torch.arange(steps)
        seen = view.attention.visible(at, at)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (weights[:, 2:] - weights[:, 1:-1]).abs().sum(-1) / 2
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)
        assert bool((actual <= bound + 1e-9).all())
        row = 20
        both = seen[row] & seen[row + 1]
        change = (logits[3, row + 1] - logits[3, row])[both]
        outside = weights[3, row, ~both].sum() + weights[3, row + 1, ~both].sum()
        by_hand = math.tanh(float(change.max() - change.min()) / 4) + float(outside)
        assert float(bound[3, row - 1]) == pytest.approx(by_hand, rel=1e-6)


def test_the_attention_bound_adds_up() -> None:
    check = AttentionBound()
    assert check.result().verdict == "untestable"
    ids = torch.randint(3, 90, (1, 37), generator=torch.Generator().manual_seed(0))
    prefill(tiny_model("llama"), ids, check)
    result = check.result()
    assert (result.checked, result.violations, result.verdict) == (2 * 6 * 16, 0, "pass")
    assert result.tightness > 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_made_up_heads_are_called_what_they_are(pattern: str) -> None:
    """At every level of noise that is promised, with five seeds."""
    for noise in NOISE:
        for seed in range(5):
            assert label(construct(pattern, noise, seed)) == (pattern, pattern), (noise, seed)


def test_check_constructed_says_what_is_wrong() -> None:
    assert {one.verdict for one in check_constructed(seeds=1)} == {"pass"}
    assert Constructed("seasonal", 0.0, 0, "seasonal", "periodic").verdict == "fail"
    assert Constructed("seasonal", 0.0, 0, "periodic", "seasonal").verdict == "fail"


def test_auroc_by_hand() -> None:
    scores, positive = np.array([1.0, 2.0, 3.0, 3.0]), np.array([False, True, False, True])
    assert auroc(scores, positive) == (0.5 * 1 + 1 + 0 + 1) / 4
    assert auroc(np.arange(6.0), np.arange(6) > 2) == 1
    assert auroc(-np.arange(6.0), np.arange(6) > 2) == 0


def test_observations_have_intervals_and_say_where_nothing_is_to_compare(
    analysis: Analysis,
) -> None:
    found = observe(analysis, 211)
    frame = analysis.to_frame()
    spearman = [x for x in found if x.figure == "Spearman"]
    assert len(spearman) == 8
    default = next(x for x in spearman if x.variant == "pre_all_prompt")
    ranks = frame[["q_similarity", "predictability"]].rank().corr().iloc[0, 1]
    assert default.value == pytest.approx(ranks)
    assert default.n == 12
    for one in found:
        if one.value is not None and one.low is not None and one.high is not None:
            assert one.low <= one.value <= one.high
    only = analysis.to_frame()["observed"].nunique() == 1
    assert only == all(x.value is None for x in found if x.figure == "AUROC")


def test_stability_is_the_least_rank_correlation(analysis: Analysis) -> None:
    same = stability({"a": analysis, "b": analysis})
    assert [x.value for x in same] == [pytest.approx(1)] * 8
    assert stability({"a": analysis}) == []


def test_sensitivity_is_the_naive_one() -> None:
    """One layer cut, by a cache whose other layers are full; KL by hand."""
    model: Any = tiny_model("llama", num_hidden_layers=3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (101 + NEXT,), generator=generator).tolist()
    found = measure_sensitivity(model, [ids])
    assert (found.layers.shape, found.heads.shape, found.prompts) == ((3,), (3, 3), 1)
    recording = record(model, torch.tensor([ids[:100]]))
    full, small = recording.compress("full", [None])[0], recording.compress("snapkv", [KEPT])[0]
    tail = torch.tensor([ids[100:-1]])
    with torch.inference_mode():
        reference = model(torch.tensor([ids[:-1]])).logits[0, 100:].log_softmax(-1)
        for layer in range(3):
            cache = full.copy()
            cache.compressed_layers[layer].held = small.compressed_layers[layer].storage().copy()
            cache.compressed_layers[layer].complete = False
            cache.frozen = True
            log_p = model(tail, **with_cache(model, cache)).logits[0].log_softmax(-1)
            kl = float((reference.exp() * (reference - log_p)).sum(-1).mean())
            assert found.layers[layer] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert (found.heads < found.layers[:, None] * 3 + 1e-6).all()
    assert compressed(model, "full").tokens_seen == 0


def test_rank_correlations_by_hand(analysis: Analysis) -> None:
    frame = analysis.to_frame()
    means = 1 - frame.groupby(["layer", "kv_head"])["q_similarity"].mean().to_numpy()
    from tappa.verification.sensitivity import Sensitivity

    made_up = Sensitivity(np.array([1.0, 2.0]), means.reshape(2, 3) * 5 + 1, 1)
    found = [x for x in correlate(made_up, analysis) if x.variant == "pre_all_prompt"]
    assert [(x.grain, x.value, x.n) for x in found] == [("KV heads", pytest.approx(1), 6)]
