"""Prompts that repeat, and whether heads repeat with them: against naive loops and by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tappa.attention_profile import SINK_TOKENS, Attention
from tappa.capture import LayerView, prefill
from tappa.rope import RotaryLayout
from tappa.verification.observations import rank_correlations, repeats, resonates
from tappa.verification.seasons import (
    MIN_SEASONS,
    RepeatingPrompt,
    measure_moved,
    measure_resonance,
    repeating_prompts,
    resonance_of,
)
from tiny import tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9


def test_prompts_repeat_as_they_say() -> None:
    tokenizer = tiny_tokenizer()
    found = {prompt.kind: prompt for prompt in repeating_prompts(tokenizer, TEXT, 401)}
    for kind, prompt in found.items():
        assert len(prompt.ids) == 401
        assert prompt.lags[0] == prompt.period
        assert prompt.lags[-1] <= 200 < prompt.lags[-1] + prompt.period
        assert len(prompt.lags) >= MIN_SEASONS
        if kind.startswith("block"):
            assert prompt.ids[prompt.period :] == prompt.ids[: -prompt.period]
    assert found["block of 7"].period == 7
    line = next(prompt for kind, prompt in found.items() if kind.startswith("table"))
    end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    assert {line.ids[i] for i in range(line.period - 1, 401, line.period)} == {end}
    assert repeating_prompts(tokenizer, TEXT, 40) == []


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_figures_are_those_of_naive_loops(kind: str) -> None:
    """Grouped queries, and a sliding window that hides keys."""
    views: list[LayerView] = []
    ids = torch.randint(3, 90, (1, 37), generator=torch.Generator().manual_seed(0))
    prefill(tiny_model(kind), ids, views.append)
    lag, rows = 5, 11
    for view in views:
        found = resonance_of(view, [3, lag], rows)
        head = 3
        q, k = view.queries[head].double(), view.keys[head // 2].double()
        plain_q, plain_k = view.queries_before[head], view.keys_before
        energy = view.rotary.norms(plain_q[-rows:]).mean(0)
        energy = energy * view.rotary.norms(plain_k[head // 2, SINK_TOKENS:]).mean(0)
        changes = [
            abs(float(q[t] @ k[i + lag] - q[t] @ k[i]))
            for t in range(37 - rows, 37)
            for i in range(SINK_TOKENS, t - lag + 1)
            if view.attention.window is None or t - i < view.attention.window
        ]
        expected = sum(changes) / max(len(changes), 1) / float(energy.sum())
        assert float(found["change"][head, 1]) == pytest.approx(expected, rel=1e-4)
        shares = energy / energy.sum()
        chords = torch.zeros(len(shares))
        theta = view.rotary.theta
        chords[: len(theta)] = (2 * torch.sin(lag * theta / 2).abs()).float()
        assert float(found["all_channels"][head, 1]) == pytest.approx(
            float((shares * chords).sum()), rel=1e-4
        )
        top = int(shares[: len(theta)].argmax())
        assert float(found["dominant"][head, 1]) == pytest.approx(
            float(shares[top] * chords[top]), rel=1e-4, abs=1e-7
        )
        cosines = [
            torch.cosine_similarity(x[SINK_TOKENS + lag :], x[SINK_TOKENS:-lag], dim=1).mean()
            for x in (plain_q, plain_k[head // 2])
        ]
        expected = float(sum(cosines)) / 2
        assert float(found["repeats"][head, 1]) == pytest.approx(expected, abs=1e-5)


def test_one_channel_repeats_at_resonance_only() -> None:
    """theta = 2 pi / 6: after 6 tokens nothing changes, after 3 all that can."""
    theta = torch.tensor([2 * math.pi / 6], dtype=torch.float64)
    zero = torch.tensor([0])
    rotary = RotaryLayout(zero, zero + 1, zero, zero[:0]).channels(theta)
    steps = 60
    same = torch.tensor([1.0, 0.0]).expand(1, steps, 2)
    turned = rotary.rotate(same, torch.arange(steps))
    view = LayerView(0, 0, turned, turned, rotary, Attention(1.0), 0, 0)
    found = resonance_of(view, [3, 6, 12])
    assert found["repeats"].tolist() == [[pytest.approx(1.0)] * 3]
    assert found["all_channels"][0].tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-5)
    assert found["change"][0, 1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    # |cos(x + pi) - cos(x)| = 2 |cos x| at x = 0, 60, 120 degrees and so on: 2, 1, 1
    assert float(found["change"][0, 0]) == pytest.approx(4 / 3, rel=0.05)


def test_a_moved_channel_is_put_back_and_is_seen() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = repeating_prompts(tiny_tokenizer(), TEXT, 150)[0]
    moved = measure_moved(model, prompt, [(0, 1), (1, 3)], [0, 1, 99])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {len(x.change) for x in moved} == {len(x.expected) for x in moved} == {len(prompt.lags)}
    assert 2 <= len(moved) <= 4  # not to the channel where it is, nor to one that is not there
    assert {(x.layer, x.head) for x in moved} == {(0, 1), (1, 3)}
    first = moved[0]
    expected = spearmanr(first.change, first.expected).statistic
    found, control = resonates(moved[:1])
    assert found.value == pytest.approx(expected)
    assert control.value == pytest.approx(spearmanr(first.change, first.lags).statistic)
    assert measure_moved(model, prompt, [(0, 1)], [99]) == resonates([]) == []


def test_every_head_has_a_line() -> None:
    model = tiny_model("qwen2")
    prompt = repeating_prompts(tiny_tokenizer(), TEXT, 150)[0]
    seen = measure_resonance(model, prompt)
    config = model.config.get_text_config()
    heads = config.num_hidden_layers * config.num_attention_heads
    assert seen.curves("change").shape == (heads, len(prompt.lags))
    found = {x.claim.partition(": ")[2].partition(": ")[2]: x for x in repeats(prompt, seen)}
    assert found["queries and keys repeat"].n == heads
    share = float((seen.curves("season") % prompt.period == 0).mean())
    assert found["the season found is a multiple of it"].value == share


def test_rank_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (3, 11)).astype(float), rng.normal(size=(3, 11))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert rank_correlations(x, y) == pytest.approx(expected)
    assert np.isnan(rank_correlations(np.ones((1, 5)), y[:1, :5]))[0]


def test_lags_are_multiples_up_to_half() -> None:
    assert RepeatingPrompt("x", 3, [1] * 20).lags == [3, 6, 9]
