"""Calibration on tiny models, against naive computations; merged, saved, interrupted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tappa.errors import NonFiniteError, PruningError, TextError
from tappa.pruning import Calibration, Windows, calibrate, calibrate_on
from tappa.pruning.calibration import EVERY
from tiny import tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 5
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"]


def windows_of(model: Any, **changes: Any) -> Windows:
    options: dict[str, Any] = {"window": 31, "stride": 17} | changes
    return Windows.of(model, tiny_tokenizer(), TEXT, **options)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_block_influence_is_the_naive_one(kind: str) -> None:
    """From hidden states that the model itself returns, token by token."""
    model: Any = tiny_model(kind)
    windows = windows_of(model, limit=3)
    found = calibrate_on(model, windows).block_influence
    model.model.norm = nn.Identity()  # so that the last hidden state is the last layer's output
    for layer in range(len(found)):
        total, count = 0.0, 0
        for ids in windows.ids:
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for before, after in zip(states[layer][0], states[layer + 1][0], strict=True):
                total, count = total + cosine(before, after), count + 1
        assert found[layer] == pytest.approx(1 - total / count, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_q_similarity_and_head_output_are_the_naive_ones(kind: str) -> None:
    """All pairs of queries before RoPE; and each head's part of what o_proj gets, mapped alone."""
    model: Any = tiny_model(kind)
    windows = windows_of(model, limit=2)
    found = calibrate_on(model, windows)
    heads, seen = model.config.num_attention_heads, dict[str, torch.Tensor]()
    attention = model.model.layers[1].self_attn
    query = attention.q_norm if kind == "qwen3" else attention.q_proj
    query.register_forward_hook(lambda m, a, out: seen.update(q=out[0]))
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(o=a[0][0]))
    model.model.layers[1].register_forward_pre_hook(lambda m, a: seen.update(x=a[0][0]))
    similarity, output = np.zeros(heads), np.zeros(heads)
    for ids in windows.ids:
        model(torch.tensor([ids]))
        queries = seen["q"].reshape(len(ids), heads, -1)
        parts, weight = seen["o"].reshape(len(ids), heads, -1), attention.o_proj.weight
        for head in range(heads):
            pairs = [(s, t) for s in range(len(ids)) for t in range(len(ids)) if s != t]
            q = queries[:, head]
            similarity[head] += sum(cosine(q[s], q[t]) for s, t in pairs) / len(pairs)
            columns = weight[:, head * parts.shape[2] : (head + 1) * parts.shape[2]]
            shares = (parts[:, head] @ columns.T).norm(dim=1) / seen["x"].norm(dim=1)
            output[head] += float(shares.sum())
    np.testing.assert_allclose(found.q_similarity[1], similarity / len(windows.ids), atol=1e-5)
    np.testing.assert_allclose(found.head_output[1], output / found.tokens, rtol=1e-4)


def test_merging_is_calibrating_on_both() -> None:
    model = tiny_model("llama")
    whole = windows_of(model)
    parts = [Windows(whole.ids[:3], 31, 17), Windows(whole.ids[3:], 31, 17)]
    first, second = (calibrate_on(model, part) for part in parts)
    both, merged = calibrate_on(model, whole), first.merge(second)
    assert (merged.windows, merged.tokens) == (both.windows, both.tokens)
    for name in ("cosines", "similarity", "output"):
        np.testing.assert_allclose(getattr(merged, name), getattr(both, name), rtol=1e-12)
    other = calibrate_on(tiny_model("qwen2"), parts[0])
    with pytest.raises(PruningError, match="model differs"):
        first.merge(other)
    with pytest.raises(PruningError, match="settings differs"):
        first.merge(calibrate_on(model, Windows(whole.ids[:1], 31, 5)))


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = calibrate(model, tiny_tokenizer(), TEXT, window=31, limit=2)
    loaded = Calibration.load(found.save(tmp_path / "c.json"))
    assert loaded.model == found.model
    assert loaded.tokens == found.tokens == 62
    np.testing.assert_array_equal(loaded.similarity, found.similarity)
    content = json.loads((tmp_path / "c.json").read_text())
    for damage in ({"schema": "x"}, {"windows": 0}, {"cosines": [1.0]}, {"output": "no"}):
        (tmp_path / "bad.json").write_text(json.dumps(content | damage))
        with pytest.raises(PruningError, match=r"bad\.json"):
            Calibration.load(tmp_path / "bad.json")
    for text in ("", "[]", "{", "null"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PruningError, match=r"bad\.json"):
            Calibration.load(tmp_path / "bad.json")
    with pytest.raises(PruningError, match=r"none\.json"):
        Calibration.load(tmp_path / "none.json")


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    model = tiny_model("llama")
    windows = windows_of(model)
    assert len(windows.ids) > EVERY + 2
    state, calls = tmp_path / "state.json", list[int]()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()

    def stop(done: int, total: int) -> None:
        if done == EVERY + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_on(model, windows, state=state, progress=stop)
    assert Calibration.load(state).windows == EVERY
    resumed = calibrate_on(
        model, windows, state=state, progress=lambda done, total: calls.append(done)
    )
    assert calls == list(range(EVERY, len(windows.ids) + 1))
    undisturbed = calibrate_on(model, windows)
    np.testing.assert_allclose(resumed.similarity, undisturbed.similarity, rtol=1e-12)
    assert resumed.windows == undisturbed.windows
    again = calibrate_on(model, windows, state=state, progress=lambda *a: calls.append(-1))
    assert calls.count(-1) == 1  # complete: nothing to do but to say so
    np.testing.assert_array_equal(again.cosines, resumed.cosines)
    before = state.read_bytes()
    with pytest.raises(PruningError, match="other texts"):
        calibrate_on(model, windows_of(model, stride=13), state=state)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(PruningError, match="another model"):  # the same path, other weights
        calibrate_on(model, windows, state=state)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(weight)
    model.config._name_or_path = "elsewhere"  # the same weights, another path
    assert calibrate_on(model, windows, state=state).model["name"] == "elsewhere"
    with pytest.raises(PruningError, match="another model"):
        calibrate_on(tiny_model("qwen2"), windows, state=state)
    (tmp_path / "state.json.progress").unlink()
    with pytest.raises(PruningError, match="choose another file"):
        calibrate_on(model, windows, state=state)
    assert state.read_bytes() == before


def test_windows() -> None:
    model = tiny_model("llama")
    ids = tiny_tokenizer()(TEXT).input_ids
    assert windows_of(model).ids == [ids[s : s + 31] for s in range(0, len(ids) - 30, 17)]
    few = windows_of(model, limit=3)
    assert len(few.ids) == 3
    assert few.ids[0] == ids[:31]
    assert Windows.of(model, tiny_tokenizer(), "A short text.", window=31).ids == [
        tiny_tokenizer()("A short text.").input_ids
    ]
    for wrong in ({"window": 7}, {"window": 513}, {"stride": 0}, {"limit": 0}):
        with pytest.raises(PruningError, match="expected"):
            windows_of(model, **wrong)
    for texts in ("short", [], [TEXT, "no"]):
        with pytest.raises(TextError, match="at least 8 tokens"):
            Windows.of(model, tiny_tokenizer(), texts, window=31)


def test_nan_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        calibrate_on(model, windows_of(model, limit=1))
