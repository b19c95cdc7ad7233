"""From a model folder to files, as a user runs it, and the ways it is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tappa
from tappa.cli import main
from tappa.errors import AnalysisFileError, NonFiniteError
from tappa.models import LoadedModel
from tappa.patterns import LABELS
from tappa.texts import packaged_text
from tiny import ROPE_KINDS, save_tiny, tiny_model, tiny_tokenizer

TEXTS = [packaged_text()[:400], packaged_text()[1000:1400]]
ASKED = (
    *("layer", "head", "q_similarity", "k_similarity", "dominant_channel", "dominant_share"),
    *("period", "sink_mass", "predictability", "explained", "observed"),
)


def analysis_of(kind: str, texts: list[str], **options: Any) -> tappa.Analysis:
    return tappa.analyze(tiny_model(kind), tiny_tokenizer(), texts, tokens=41, **options)


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_every_head_is_there_and_no_bound_is_violated(kind: str) -> None:
    summary = analysis_of(kind, TEXTS[:1]).summary()
    assert len(summary["heads"]) == summary["model"]["layers"] * summary["model"]["heads"]
    assert summary["bound_violations"] == 0
    assert summary["bounds_checked"] > 1000
    assert {head["observed"] for head in summary["heads"]} <= set(LABELS)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_chunks_give_the_figures_of_the_whole_prompt(kind: str) -> None:
    names = ["q_similarity", "k_similarity", "vertical", "diagonal", "entropy", "sink_mass"]
    whole, chunked = (
        analysis_of(kind, TEXTS[:1], **options).to_frame()[names] for options in ({}, {"chunk": 13})
    )
    np.testing.assert_allclose(chunked, whole, atol=2e-6)


def test_merging_two_analyses_is_analysing_both_texts() -> None:
    both = analysis_of("llama", TEXTS)
    merged = analysis_of("llama", TEXTS[:1]).merge(analysis_of("llama", TEXTS[1:]))
    assert merged.prompts == both.prompts == [41, 41]
    for a, b in zip(merged.layers, both.layers, strict=True):
        for name, sums in a.sums.items():
            np.testing.assert_allclose(sums, b.sums[name], rtol=1e-12, err_msg=name)


def test_merging_another_model_is_refused() -> None:
    with pytest.raises(AnalysisFileError, match="model differs"):
        analysis_of("llama", TEXTS[:1]).merge(analysis_of("qwen2", TEXTS[:1]))


def test_a_saved_analysis_comes_back_as_it_was(tmp_path: Path) -> None:
    analysis = analysis_of("llama", TEXTS)
    loaded = tappa.Analysis.load(analysis.save(tmp_path / "a.json"))
    assert loaded.summary() == analysis.summary()
    for a, b in zip(loaded.layers, analysis.layers, strict=True):
        assert all(np.array_equal(a.sums[name], b.sums[name]) for name in b.sums)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected an Analysis in JSON"),
        ("[1]", "has None"),
        ('{"schema": "tappa.analysis/0"}', "tappa.analysis/0"),
        ('{"schema": "tappa.analysis/1"}', "incomplete"),
    ],
)
def test_other_files_are_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(AnalysisFileError, match=says):
        tappa.Analysis.load(path)


def test_nan_names_layer_and_head() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[2 * attention.head_dim + 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"queries.*layer 1, head 2"):
        tappa.analyze(model, tiny_tokenizer(), TEXTS[0], tokens=41)
    assert model.config._attn_implementation == "sdpa"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tappa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_json_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_tiny(tmp_path / "model"), tmp_path / "out"
    options = ("--tokens", 41, "--out", out)
    assert run(monkeypatch, "analyze", folder, *options, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert {"schema", "model", "tokens", "bound_violations", "agreement"} <= content.keys()
    assert all(set(ASKED) <= head.keys() for head in content["heads"])
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "heads.csv"]
    assert tappa.Analysis.load(out / "analysis.json").summary() == content


def test_the_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "analyze", save_tiny(tmp_path / "model"), "--tokens", 41) == 0
    printed = capsys.readouterr().out
    assert "0 violations" in printed
    assert "Most typical heads" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["MISSING"], "MISSING"),
        (["MODEL", "--text", "none.txt"], "none.txt"),
        (["MODEL", "--text", "latin.txt"], "UTF-8"),
        (["MODEL", "--text", "empty.txt"], "empty"),
        (["MODEL", "--text", "short.txt"], "at least 8 tokens"),
        (["MODEL", "--tokens", "3"], "at least 8 tokens"),
        (["MODEL", "--tokens", "100000"], "context"),
        (["MODEL", "--device", "abacus"], "abacus"),
        (["MODEL", "--dtype", "int3"], "int3"),
        (["MODEL", "--out", "short.txt/below"], "cannot write"),
        (["GPT2"], "rotary"),
        (["broken.gguf"], "broken.gguf"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "MODEL")
    save_tiny(tmp_path / "GPT2", "gpt2")
    Path("latin.txt").write_bytes("déjà vu, ".encode("latin-1") * 99)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("a b")
    Path("broken.gguf").write_bytes(b"GGUF" + bytes(range(99)))
    before = sorted(tmp_path.rglob("*"))
    assert run(monkeypatch, "analyze", *arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == ""
    assert len(errors) == 1
    assert says in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.xdist_group("smollm2")
def test_a_real_model(smollm2: LoadedModel) -> None:
    analysis = tappa.analyze(*smollm2, packaged_text(), tokens=256)
    summary, heads = analysis.summary(), analysis.to_frame().set_index(["layer", "head"])
    assert len(heads) == 270
    assert summary["bound_violations"] == 0
    assert heads.loc[18, 8]["sink_mass"] > 0.9
    assert heads.loc[18, 8]["observed"] == heads.loc[18, 8]["explained"] == "re-access"
    assert summary["agreement"]["spearman_expected_diagonal"] > 0.6
