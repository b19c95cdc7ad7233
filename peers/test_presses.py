"""Our scorers and budgets against kvpress's presses, on SmolLM2 and 1000 tokens of a novel.

Scores agree to 1e-4 of the largest score of a layer. Where rounding puts one token in another's
place, their scores are closer than BORDER. (Measured: 2e-6 at most, and no token in another's.)
"""

from dataclasses import replace

import pytest
import torch
from captured import Kept, Run, ours, theirs
from kvpress import (
    ExpectedAttentionPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor

from tappa.compression import methods
from tappa.compression.scorers import Scores, TokenView

TOKENS, BUDGET = 1000, 250
RATIO = 1 - BUDGET / TOKENS  # kvpress keeps int(tokens * (1 - ratio)), which is BUDGET
CLOSE, BORDER = 1e-4, 1e-5  # of a layer's largest score


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Between scores (layers, kv_heads, tokens), as a share of the largest score of a layer."""
    return float(((a - b).abs().amax((1, 2)) / b.abs().amax((1, 2))).max())


def swapped(run: Run, kept: Kept) -> float:
    """Between tokens that only one of two caches keeps, as many as the other: the largest
    difference of scores in any head, as a share of the largest score of its layer.
    """
    worst = 0.0
    for layer, (mine, other) in enumerate(zip(run.kept, kept, strict=True)):
        for head, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert len(a) == len(b)
            scores = run.scores[layer, head, sorted(set(a) ^ set(b))]
            if len(scores):
                spread = scores.max() - scores.min()
                worst = max(worst, float(spread / run.scores[layer].abs().max()))
    return worst


@pytest.fixture(scope="module")
def model(smollm2):
    return smollm2.model


def test_streaming_llm_keeps_the_same_tokens(model, ids):
    """Scores cannot be compared: kvpress scores 1 for what stays and 0 for what goes, tappa the
    position. kvpress's press has no window of its own: the last BUDGET - 4 tokens stay.
    """
    assert ids.shape[1] == TOKENS
    mine = ours(model, ids, methods.streaming_llm(window=32, sinks=4), BUDGET)
    other = theirs(model, ids, StreamingLLMPress(RATIO, n_sink=4))
    assert mine.kept == other.kept


@pytest.mark.parametrize(("window", "kernel"), [(32, 5), (64, 7)])
def test_snapkv(model, ids, window, kernel):
    """Inside the window, tappa scores 0 and protects; kvpress scores its maximum + 1."""
    mine = ours(model, ids, methods.snapkv(window, kernel), BUDGET)
    other = theirs(model, ids, SnapKVPress(RATIO, window, kernel))
    assert largest_difference(mine.scores[..., :-window], other.scores[..., :-window]) < CLOSE
    assert swapped(mine, other.kept) < BORDER


def test_pyramidkv(model, ids):
    """Scores as SnapKV's. Layers get the same share of the budget but for rounding: kvpress rounds
    to the nearest, tappa down, so that a head may differ by one token. Here the last layer's share,
    250 / 4 = 62 tokens, is above the window and kvpress does not fall back to SnapKV.
    """
    window = 32
    mine = ours(model, ids, methods.pyramidkv(window, beta=4.0), BUDGET)
    press = PyramidKVPress(RATIO, window, beta=4)
    other = theirs(model, ids, press)
    assert largest_difference(mine.scores[..., :-window], other.scores[..., :-window]) < CLOSE
    assert len(other.kept[0][0]) > 400
    assert len(other.kept[-1][0]) < 70
    for layer, (a, b) in enumerate(zip(mine.kept, other.kept, strict=True)):
        scores = mine.scores[layer]
        for head, (few, many) in enumerate(zip(a, b, strict=True)):
            assert 0 <= len(many) - len(few) <= 1
            missing = set(few) - set(many)
            cut = min(scores[head, p] for p in many if p < TOKENS - window)
            assert all((scores[head, p] - cut).abs() < BORDER * scores.max() for p in missing)


def test_expected_attention(model, ids):
    """Inside the first 4 tokens, tappa scores 0 and protects; kvpress scores its maximum + 1."""
    mine = ours(model, ids, methods.expected_attention(0, 4, 512), BUDGET)
    press = ExpectedAttentionPress(RATIO, n_future_positions=512, n_sink=4)
    other = theirs(model, ids, press)
    assert largest_difference(mine.scores[..., 4:], other.scores[..., 4:]) < CLOSE
    assert swapped(mine, other.kept) < BORDER


def test_h2o(eager_smollm2, ids):
    """H2O sums the attention a token receives; kvpress divides that by the number of queries that
    see the token, and protects no window. With both, scores and tokens are the same.
    """
    model, method = eager_smollm2.model, methods.h2o(window=0)

    def mean(tokens: TokenView) -> Scores:
        return method.scorer.score(tokens) / (tokens.seen - tokens.positions)

    divided = replace(method, scorer=replace(method.scorer, score=mean))
    mine = ours(model, ids, divided, BUDGET)
    other = theirs(model, ids, ObservedAttentionPress(RATIO))
    assert largest_difference(mine.scores, other.scores) < CLOSE
    assert swapped(mine, other.kept) < BORDER
    whole = ours(model, ids, methods.h2o(window=32), BUDGET)
    seen = torch.arange(TOKENS, 0, -1)
    assert largest_difference(whole.scores / seen, other.scores) < CLOSE
