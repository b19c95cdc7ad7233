"""Channels that are moved, and put back; spacings by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tappa
from tappa.errors import TappaError, VerificationError
from tappa.models import LoadedModel
from tappa.texts import packaged_text
from tappa.verification.periods import spacing
from tappa.verification.relocation import choose_heads, relocate, view_of
from tappa.verification.swapping import base_changed, channels_swapped, must_swap_all
from tappa.verification.verify import Verification, verify
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Callable[..., Any] = make_tiny
IDS = torch.randint(3, 90, (61,), generator=torch.Generator().manual_seed(0)).tolist()
SEPARATE = ["llama", "mistral", "qwen2", "gemma3"]


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- spacings


@given(st.floats(2.2, 60), st.floats(0, 6.28), st.floats(-3, 3), st.floats(-3, 3))
def test_spacing_finds_the_period_of_a_sinusoid(
    tokens: float, phase: float, slope: float, bend: float
) -> None:
    """Under any quadratic trend."""
    x = np.arange(200)
    curve = np.cos(2 * np.pi * x / tokens + phase) + slope * x / 200 + bend * (x / 200) ** 2
    assert spacing(curve) == pytest.approx(tokens, rel=1e-3)


def test_what_has_no_spacing() -> None:
    assert spacing(np.zeros(100)) is None
    assert spacing(np.arange(100.0)) is None
    assert spacing(np.ones(5)) is None
    assert spacing(np.array([math.nan] * 50)) is None


# ---- swapping


@pytest.mark.parametrize("kind", [*SEPARATE, "phi3", "qwen3"])
def test_a_swap_swaps_pairs_of_dimensions_and_is_undone(kind: str) -> None:
    """Queries before RoPE have the two channels exchanged, in the group and nowhere else."""
    model = tiny_model(kind)
    before, plain = state(model), view_of(model, IDS, 1)
    shared = must_swap_all(model, 1, plain.rotary.dim)
    assert shared == (kind in ("qwen3", "gemma3"))
    groups = [0, 1, 2] if shared else [1]
    queries, keys = plain.queries_before, plain.keys_before
    with channels_swapped(model, 1, groups, plain.rotary, 0, 3):
        moved = view_of(model, IDS, 1)
    assert same(model, before)
    order = list(range(plain.rotary.dim))
    for dims in (plain.rotary.first.tolist(), plain.rotary.second.tolist()):
        order[dims[0]], order[dims[3]] = dims[3], dims[0]
    heads = [2 * g + i for g in groups for i in range(2)]
    for head in range(6):
        expected = queries[head][:, order] if head in heads else queries[head]
        actual = moved.queries_before[head]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    for group in range(3):
        expected = keys[group][:, order] if group in groups else keys[group]
        actual = moved.keys_before[group]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_everything_is_put_back_after_an_error() -> None:
    model = tiny_model("llama")
    before, rotary = state(model), view_of(model, IDS, 0).rotary
    with channels_swapped(model, 0, [0], rotary, 0, 1):
        assert not same(model, before)
    with pytest.raises(KeyboardInterrupt), channels_swapped(model, 0, [0], rotary, 0, 1):
        raise KeyboardInterrupt
    buffers = [module.inv_freq.clone() for module in model.modules() if hasattr(module, "inv_freq")]
    with pytest.raises(KeyboardInterrupt), base_changed(model, 0.1):
        raise KeyboardInterrupt
    after = [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]
    assert all(torch.equal(a, b) for a, b in zip(buffers, after, strict=True))
    assert same(model, before)


def test_what_cannot_be_swapped() -> None:
    model = tiny_model("llama")
    rotary = view_of(model, IDS, 0).rotary
    for a, b in ((0, 0), (0, 5), (-1, 2)):
        with pytest.raises(VerificationError, match="two different channels from 0 to 4"):
            channels_swapped(model, 0, [0], rotary, a, b).__enter__()
    other = tiny_model("qwen3")
    with pytest.raises(VerificationError, match="shared by all heads"):
        channels_swapped(other, 0, [0], view_of(other, IDS, 0).rotary, 0, 1).__enter__()
    neox = tiny_model("gpt_neox")
    with pytest.raises(VerificationError, match="neither"):
        channels_swapped(neox, 0, [0], view_of(neox, IDS, 0).rotary, 0, 1).__enter__()


def test_the_base_is_changed() -> None:
    """theta_m = base^(-m / 5) of five channels; another base, other frequencies."""
    model = tiny_model("llama")
    with base_changed(model, 0.01) as base:
        assert base == pytest.approx(100)
        theta = view_of(model, IDS, 0).rotary.theta
    expected = [100 ** (-m / 5) for m in range(5)]
    assert theta.tolist() == pytest.approx(expected, rel=1e-5)
    theta = view_of(model, IDS, 0).rotary.theta
    assert theta.tolist() == pytest.approx([10000 ** (-m / 5) for m in range(5)], rel=1e-5)
    for factor in (0.0, 1e-5, math.nan, math.inf):
        with pytest.raises(VerificationError, match="base above 1"):
            base_changed(model, factor).__enter__()
    with pytest.raises(VerificationError, match="not scaled"):
        base_changed(tiny_model("llama-yarn"), 0.1).__enter__()


# ---- relocation


def test_what_is_not_there_is_refused_and_what_does_not_fit_is_untestable() -> None:
    model = tiny_model("llama")
    with pytest.raises(VerificationError, match="layer from 0 to 1, got 2"):
        relocate(model, IDS, [(2, 0)])
    with pytest.raises(VerificationError, match="head from 0 to 5, got 6"):
        relocate(model, IDS, [(0, 6)])
    with pytest.raises(VerificationError, match="channel from 0 to 4, got 5"):
        relocate(model, IDS, [(0, 0)], [5])
    found = relocate(model, IDS, [(0, 0)], [0, 1, 2, 3, 4])
    reasons = {one.target: one.reason for one in found}
    assert sum(one.reason.startswith("the target is the dominant") for one in found) == 1
    assert all("does not fit 57 tokens" in reasons[m] for m in (2, 3, 4) if m != found[0].source)
    assert {one.verdict for one in found if one.reason} == {"untestable"}
    scaled = relocate(tiny_model("llama-yarn"), IDS, [(0, 0)], [0, 1], [10.0])
    assert all("not scaled" in one.reason or "already" in one.reason for one in scaled)


def test_no_rope_is_one_line() -> None:
    with pytest.raises(TappaError):
        view_of(tiny_model("gpt2"), IDS, 0)


@pytest.mark.xdist_group("smollm2")
def test_moved_channels_move_the_diagonals_of_smollm2(smollm2: LoadedModel) -> None:
    """Theorem 5.3 and the change of base: predicted and measured spacing, within 1%."""
    model: Any = smollm2.model
    before = state(model)
    ids = smollm2.tokenizer(packaged_text()[:3000]).input_ids[:256]
    heads = [(12, 4), (27, 3)]  # ruled by one channel, which turns once in 10,000s of tokens
    found = relocate(model, ids, heads, [2, 3, 12], [1.0, 0.1])
    assert same(model, before)
    for one in found:
        base = 100_000 * one.base_factor
        assert one.predicted == pytest.approx(2 * math.pi * base ** (one.target / 32), rel=1e-6)
        if one.target == 12:
            assert (one.verdict, one.measured) == ("untestable", None)
            continue
        assert one.verdict == "pass"
        assert one.measured == pytest.approx(one.predicted, rel=0.01)
        assert one.attention == pytest.approx(one.predicted, rel=0.02)
        assert one.lag0 is not None
        assert one.lag0 < 1e-5
    assert len(found) == 12


def test_heads_are_chosen_by_how_much_one_channel_rules() -> None:
    analysis = tappa.analyze(make_tiny("llama"), tiny_tokenizer(), "A truth, it is. " * 9)
    chosen = choose_heads(analysis, 4)
    frame = analysis.to_frame()
    frame["score"] = frame["dominant_share"] * frame["alignment"]
    best = frame.sort_values("score", ascending=False).iloc[0]
    assert chosen[0] == (best["layer"], best["head"])
    groups = {(layer, head // 2) for layer, head in chosen}
    assert len(groups) == len(chosen) == 4


def test_claims_that_a_model_does_not_let_us_test_are_notes() -> None:
    """Queries, keys and values are one matrix; channels are fewer than the usual targets."""
    rope = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.25}
    model = tiny_model("gpt_neox", rope_parameters=rope)  # channel 2: one turn in 29 tokens
    wanted = Verification(claims=["bounds", "relocation"], tokens=160, count=2)
    found = verify(model, tiny_tokenizer(), wanted, texts={"prose": packaged_text()})
    assert found.bounds
    assert not found.relocations
    assert [note for note in found.notes if note.startswith("relocation is untestable: expected q")]
    named = Verification(claims=["relocation"], tokens=160, targets=(2, 8))
    with pytest.raises(VerificationError, match="expected"):
        verify(model, tiny_tokenizer(), named, texts={"prose": packaged_text()})
