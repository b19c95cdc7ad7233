import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tappa import Analysis, Settings, analyze
from tappa.analysis import SCHEMA
from tappa.capture import LayerView, prefill
from tappa.errors import (
    AnalysisFileError,
    CaptureError,
    NonFiniteError,
    OutputError,
    TextError,
)
from tappa.patterns import LABELS
from tappa.similarity import self_similarity
from tiny import KINDS, ROPE_KINDS, tiny_model, tiny_tokenizer

TEXT = "The quick brown fox & 42 lazy dogs; and more!"
OTHER = "Vanity and pride are different things, Mary said."
TOKENS = 40


def analysis_of(kind: str, *texts: str, **options: Any) -> Analysis:
    return analyze(tiny_model(kind), tiny_tokenizer(), texts or [TEXT], **options)


@pytest.fixture(scope="module")
def llama() -> Analysis:
    return analysis_of("llama", tokens=TOKENS)


@pytest.fixture(scope="module")
def other() -> Analysis:
    return analysis_of("llama", OTHER, tokens=TOKENS)


def sums_of(analysis: Analysis) -> dict[tuple[int, str], np.ndarray]:
    return {(layer.layer, n): x for layer in analysis.layers for n, x in layer.sums.items()}


def same_sums(a: Analysis, b: Analysis) -> None:
    """Bit by bit, types and shapes included."""
    mine, theirs = sums_of(a), sums_of(b)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert (x.dtype, x.shape) == (theirs[name].dtype, theirs[name].shape), name
        np.testing.assert_array_equal(x, theirs[name], err_msg=str(name))


def close_sums(a: Analysis, b: Analysis) -> None:
    mine, theirs = sums_of(a), sums_of(b)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        np.testing.assert_allclose(x, theirs[name], rtol=1e-12, atol=1e-12, err_msg=str(name))


def views_of(kind: str, text: str = TEXT) -> list[LayerView]:
    views: list[LayerView] = []
    ids = tiny_tokenizer()(text).input_ids[:TOKENS]
    prefill(tiny_model(kind), torch.tensor([ids]), views.append)
    return views


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_every_head_has_its_row(kind: str) -> None:
    analysis = analysis_of(kind, tokens=TOKENS)
    summary, config = analysis.summary(), KINDS[kind][1]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    places = [(h["layer"], h["head"]) for h in analysis.heads]
    assert places == [(layer, head) for layer in range(layers) for head in range(heads)]
    assert len(analysis.to_frame()) == layers * heads
    assert summary["bound_violations"] == 0
    assert summary["bounds_checked"] > 100 * layers * heads
    assert all(h["observed"] in LABELS and h["explained"] in LABELS for h in analysis.heads)
    assert summary["schema"] == SCHEMA
    assert (summary["prompts"], summary["tokens"]) == ([TOKENS], TOKENS)
    json.dumps(summary, allow_nan=False)
    for view in views_of(kind):
        rows = [h for h in analysis.heads if h["layer"] == view.layer]
        q = self_similarity(view.queries_before)
        k = self_similarity(view.keys_before)[[h["kv_head"] for h in rows]]
        np.testing.assert_allclose([h["q_similarity"] for h in rows], q, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose([h["k_similarity"] for h in rows], k, rtol=1e-6, atol=1e-7)


def test_attention_figures_are_those_of_the_attention_matrix(llama: Analysis) -> None:
    for view in views_of("llama"):
        keys = view.keys.repeat_interleave(2, 0)
        logits = view.queries @ keys.transpose(-1, -2) * 10**-0.5
        causal = torch.ones(TOKENS, TOKENS).tril().bool()
        attention = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        later, earlier = attention[:, 1:], attention[:, :-1]
        kept = torch.minimum(later, earlier).sum(-1).mean(-1)
        moved = torch.minimum(later[..., 1:], earlier[..., :-1]).sum(-1).mean(-1)
        rows = [h for h in llama.heads if h["layer"] == view.layer]
        np.testing.assert_allclose([h["vertical"] for h in rows], kept, atol=1e-5)
        np.testing.assert_allclose([h["diagonal"] for h in rows], moved, atol=1e-5)


def test_two_runs_are_equal(llama: Analysis) -> None:
    again = analysis_of("llama", tokens=TOKENS)
    same_sums(llama, again)
    assert llama.summary() == again.summary()


def test_description_of_the_model(llama: Analysis) -> None:
    assert llama.model == {
        "name": "LlamaForCausalLM",
        "class": "LlamaForCausalLM",
        "layers": 2,
        "heads": 6,
        "kv_heads": 3,
        "dtype": "float32",
    }


def test_frame_has_a_column_for_every_score(llama: Analysis) -> None:
    frame = llama.to_frame()
    for name in LABELS:
        column = [h["observed_scores"][name] for h in llama.heads]
        assert frame[f"observed_scores_{name}"].tolist() == column
    assert frame["q_similarity"].tolist() == [h["q_similarity"] for h in llama.heads]


def test_a_single_text_need_not_be_in_a_list(llama: Analysis) -> None:
    model = tiny_model("llama")
    same_sums(llama, analyze(model, tiny_tokenizer(), TEXT, tokens=TOKENS))


def test_save_and_load_again(llama: Analysis, tmp_path: Path) -> None:
    path = llama.save(tmp_path / "a.json")
    loaded = Analysis.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert loaded.summary() == llama.summary()
    assert [(x.layer, x.theta, x.scale) for x in loaded.layers] == [
        (x.layer, x.theta, x.scale) for x in llama.layers
    ]
    same_sums(llama, loaded)


def test_settings_survive_saving(llama: Analysis, tmp_path: Path) -> None:
    changed = replace(llama, settings=Settings(window=7, lags=99))
    assert Analysis.load(changed.save(tmp_path / "a.json")).settings == Settings(7, 99)


def test_merge_is_the_analysis_of_both_texts(llama: Analysis, other: Analysis) -> None:
    both = analysis_of("llama", TEXT, OTHER, tokens=TOKENS)
    merged = llama.merge(other)
    assert both.prompts == merged.prompts == [TOKENS, TOKENS]
    close_sums(both, merged)
    assert both.summary()["tokens"] == 2 * TOKENS
    # twice as many pairs, so the similarity is the mean of the two
    means = [(a["q_similarity"] + b["q_similarity"]) / 2 for a, b in _pairs(llama, other)]
    np.testing.assert_allclose([h["q_similarity"] for h in both.heads], means, rtol=1e-12)


def _pairs(a: Analysis, b: Analysis) -> zip:
    return zip(a.heads, b.heads, strict=True)


def test_merge_commutes(llama: Analysis, other: Analysis) -> None:
    close_sums(llama.merge(other), other.merge(llama))


def test_merge_leaves_its_operands_alone(llama: Analysis, other: Analysis) -> None:
    before = {name: x.copy() for name, x in sums_of(llama).items()}
    llama.merge(other)
    assert llama.prompts == [TOKENS]
    for name, x in sums_of(llama).items():
        np.testing.assert_array_equal(x, before[name])


def test_loaded_analyses_merge(llama: Analysis, other: Analysis, tmp_path: Path) -> None:
    loaded = Analysis.load(llama.save(tmp_path / "a.json"))
    same_sums(loaded.merge(other), llama.merge(other))


def test_merge_refuses_another_model_or_other_settings(llama: Analysis) -> None:
    stranger = replace(llama, model={**llama.model, "layers": 3})
    with pytest.raises(AnalysisFileError, match=r"^cannot merge: model differs"):
        llama.merge(stranger)
    measured = replace(llama, settings=Settings(window=5))
    with pytest.raises(AnalysisFileError, match=r"^cannot merge: settings differs"):
        llama.merge(measured)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_chunks_give_the_same_figures(kind: str) -> None:
    whole, chunked = (analysis_of(kind, tokens=TOKENS, chunk=chunk) for chunk in (None, 13))
    names = [name for name in whole.heads[0] if name.startswith(("q_sim", "k_sim"))]
    names += ["vertical", "diagonal", "entropy", "sink_mass"]
    assert len(names) == 22
    for name in names:
        a, b = ([h[name] for h in x.heads] for x in (whole, chunked))
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert chunked.summary()["bound_violations"] == 0
    assert chunked.prompts == [TOKENS]


@pytest.mark.parametrize(("chunk", "total"), [(None, 4), (20, 6)])
def test_progress_is_told_after_every_layer(chunk: int | None, total: int) -> None:
    """Two layers, and prompts of 40 and 8 tokens: 2 pieces and 1 with chunk=20."""
    calls: list[tuple[int, int]] = []
    texts = (TEXT[:40], OTHER[:8])
    analysis_of("llama", *texts, chunk=chunk, progress=lambda *call: calls.append(call))
    assert calls == [(step, total) for step in range(1, total + 1)]


def spoil(path: Path, **changes: Any) -> Path:
    """Change entries of a saved file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(AnalysisFileError) as caught:
        Analysis.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_load_refuses_what_is_no_analysis(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing.json")
    assert "directory" in refusal(tmp_path)
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "expected an Analysis in JSON" in refusal(path)
    for content in ("[1, 2]", "7", "null", "{}"):
        path.write_text(content)
        assert f"expected schema {SCHEMA!r}" in refusal(path)
        assert "has None" in refusal(path)


def test_load_refuses_a_truncated_file(llama: Analysis, tmp_path: Path) -> None:
    path = llama.save(tmp_path / "a.json")
    path.write_text(path.read_text()[:-1000])
    assert "expected an Analysis in JSON" in refusal(path)


def test_load_refuses_another_schema(llama: Analysis, tmp_path: Path) -> None:
    path = spoil(llama.save(tmp_path / "a.json"), schema="tappa.analysis/2")
    assert "has 'tappa.analysis/2'" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": None},
        {"settings": None},
        {"model": None},
        {"prompts": None},
        {"statistics": [{"layer": 0}]},
        {"statistics": [{"layer": 0, "theta": [1.0], "scale": 1.0, "sums": {}}]},
        {"settings": {"unknown": 3}},
    ],
)
def test_load_refuses_an_incomplete_file(
    llama: Analysis, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert "incomplete Analysis" in refusal(spoil(llama.save(tmp_path / "a.json"), **changes))


def test_save_to_an_unwritable_place_leaves_nothing(llama: Analysis, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file / "a.json", tmp_path / "missing" / "a.json"):
        with pytest.raises(OutputError, match="cannot write"):
            llama.save(place)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "row", "head"),
    [("q_proj", 43, "head 4"), ("k_proj", 29, "KV head 2")],
)
def test_nan_is_reported_with_layer_and_head(name: str, row: int, head: str) -> None:
    model = tiny_model("llama")
    getattr(model.model.layers[1].self_attn, name).weight[row, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"layer 1, {head}$"):
        analyze(model, tiny_tokenizer(), TEXT)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one text"),
        ("short", {}, "at least 8 tokens, the text has 5"),
        ([TEXT, "short"], {}, "text 2 of 2 has 5"),
        (TEXT, {"tokens": 513}, "context of 512"),
    ],
)
def test_texts_that_do_not_do(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TextError, match=message):
        analyze(tiny_model("llama"), tiny_tokenizer(), texts, **options)


@pytest.mark.parametrize(
    "damage",
    [
        {"model": None},
        {"model": {"name": "x"}},
        {"prompts": []},
        {"prompts": "many"},
        {"statistics": []},
        {"settings": {"window": "a"}},
        {"heads": []},
    ],
    ids=str,
)
def test_load_refuses_a_damaged_file(llama: Analysis, tmp_path: Path, damage: dict) -> None:
    path = llama.save(tmp_path / "a.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(AnalysisFileError, match="incomplete Analysis"):
        Analysis.load(path)


def test_load_refuses_sums_of_nothing(llama: Analysis, tmp_path: Path) -> None:
    path = llama.save(tmp_path / "a.json")
    content = json.loads(path.read_text())
    content["statistics"][0]["sums"]["rows"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(AnalysisFileError, match="incomplete Analysis"):
        Analysis.load(path)
    content["statistics"] = content["statistics"][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(AnalysisFileError, match="incomplete Analysis"):
        Analysis.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(AnalysisFileError, match="in JSON"):
        Analysis.load(path)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_that_do_not_do(chunk: int) -> None:
    with pytest.raises(TextError, match=f"chunk as a whole number from 1 on, got {chunk}"):
        analyze(tiny_model("llama"), tiny_tokenizer(), "a" * 20, chunk=chunk)


@pytest.mark.parametrize(("name", "value"), [("lags", 0), ("window", 1), ("lags", True)])
def test_settings_that_do_not_do(name: str, value: int) -> None:
    with pytest.raises(CaptureError, match=f"expected {name} of at least"):
        Settings(**{name: value})
