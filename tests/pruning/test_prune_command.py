"""`tappa prune` as users run it, on a tiny model and on a real one."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tappa.models import LoadedModel
from tappa.pruning import (
    Amounts,
    Figures,
    Windows,
    calibrate_on,
    figures_table,
    layers_removed,
    nll_of_windows,
    perplexity_of,
    plan,
)
from tappa.texts import packaged_halves
from tiny import save_tiny, save_tiny_gguf

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    """A model of five layers, and the options that all runs share."""
    model = save_tiny(tmp_path / "model", num_hidden_layers=5, hidden_size=60)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    shared = ["--text", text, "--held-out", text, "--window", 67, "--windows", 3]
    return [model, *shared, "--device", "cpu"]


def test_a_dry_run_prints_scores_and_writes_nothing(
    run: Run, files: list[object], tmp_path: Path
) -> None:
    code, out, _ = run("prune", *files, "--layers", 2, "--dry-run")
    assert code == 0
    assert "removed as number 2" in out
    assert out.count("removed as number") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]
    code, out, _ = run("prune", *files, "--layers", 2, "--dry-run", "--json")
    found = json.loads(out)
    assert found["before"] is None
    assert len(found["plan"]["layers"]) == 2
    removed = sorted((r for r in found["layers"] if r["removed"]), key=lambda r: r["removed"])
    assert [r["layer"] for r in removed] == found["plan"]["layers"]
    assert all(
        r["bi"] <= min(k["bi"] for k in found["layers"] if not k["removed"]) for r in removed
    )
    for share in ("40%", "0.59"):  # 2 of 5 layers, and 2.95
        code, out, _ = run("prune", *files, "--layers", share, "--dry-run", "--json")
        assert json.loads(out)["plan"]["layers"] == found["plan"]["layers"]


def test_a_checkpoint_with_card_figures_and_plot(
    run: Run, files: list[object], tmp_path: Path
) -> None:
    out, picture = tmp_path / "out", tmp_path / "scores.png"
    code, stdout, _ = run(
        *("prune", *files, "--layers", 2, "--kv-groups", 1, "--order", "bi"),
        *("--out", out, "--plot", picture),
    )
    assert code == 0
    assert "tokens/s" in stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (3, 2)
    content = json.loads((out / "pruning.json").read_text())
    assert content["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert content["before"]["parameters"] > content["after"]["parameters"]
    card = (out / "README.md").read_text()
    layers = ", ".join(map(str, content["plan"]["layers"]))
    for words in ("layers by `bi`", f"removal): {layers}", "3 windows of 67", "sliced out: L0 H"):
        assert words in card
    assert f"| {content['after']['perplexity']:.2f} |" in card
    assert "# model, pruned" in card  # a path tells of people
    assert str(tmp_path) not in card
    assert content["texts"] == {"calibration": "text.txt", "held_out": "text.txt"}
    assert len(content["before"]["speeds"]) == 5
    assert "Measured on cpu, " in card
    code, _, errors = run("prune", *files, "--layers", 1, "--out", out)
    assert (code, "not empty" in errors) == (2, True)
    assert "or --force to replace it" in errors
    code, _, _ = run("prune", *files, "--layers", 1, "--out", out, "--force")
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


def test_a_calibration_is_kept_and_used_again(
    run: Run, files: list[object], tmp_path: Path
) -> None:
    kept = tmp_path / "calibration.json"
    first = run("prune", *files, "--layers", 2, "--dry-run", "--calibration", kept)
    before = kept.stat().st_mtime_ns
    assert run("prune", *files, "--layers", 2, "--dry-run", "--calibration", kept) == first
    assert kept.stat().st_mtime_ns == before
    code, _, errors = run(
        "prune", *files, "--stride", 13, "--layers", 2, "--dry-run", "--calibration", kept
    )
    assert (code, "other windows" in errors) == (2, True)


def test_an_interrupt_says_so(
    run: Run,
    files: list[object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    as_users_run_it: None,
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tappa.cluster.calibrate.calibrate_on", interrupt)
    code, out, errors = run("prune", *files, "--layers", 1, "--out", tmp_path / "out")
    assert (code, out, errors) == (130, "", "error: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_large_perplexity_has_an_exponent() -> None:
    before = Figures(100, 400, [1.0, 3.0, 2.0], 20.0, [3.0], "cpu, 2 threads")
    after = replace(before, parameters=50, speeds=[4.0, 4.0, 5.0], perplexity=3.2407e26)
    text = figures_table(before, after)
    assert "| 20.00 | 3.24e+26 | 1.62e+25 |" in text
    assert "| 2.0 (1.0 to 3.0) | 4.0 (4.0 to 5.0) | 2.000 |" in text
    assert "| 100 | 50 | 0.500 |" in text
    assert "| inf | - |" in figures_table(before, replace(after, perplexity=math.inf))


def test_from_a_gguf(run: Run, files: list[object], tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "model.gguf")
    options = [tmp_path / "model.gguf", *files[1:]]
    code, _, _ = run("prune", *options, "--layers", 1, "--out", tmp_path / "out")
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", 5, "--dry-run"], "cannot remove 5 of 5 layers"),
        (["--layers", 6, "--dry-run"], "cannot remove 6 of 5 layers"),
        (["--layers", -1, "--dry-run"], "0 or more, or a share as 0.2, got -1"),
        (["--layers", 1, "--order", "bi_prim", "--dry-run"], "did you mean 'bi_prime'"),
        (["--layers", "0%", "--dry-run"], "above 0 and below 1, got 0.0"),
        (["--layers", "100%", "--dry-run"], "above 0 and below 1, got 1.0"),
        (["--layers", "a few", "--dry-run"], "a number or a share (20%), got 'a few'"),
        (["--layers", 1], "--out FOLDER"),
        (["--out", "smaller"], "nothing to remove: expected --layers"),
        (["--layers", 1, "--dry-run", "--plot", "x.gif"], ".png, .svg or .pdf"),
        (["--layers", 1, "--dry-run", "--importance", "size"], "got 'size'"),
        (["--layers", 1, "--dry-run", "--window", 5], "windows of 8 to 512"),
        (["--kv-groups", 3, "--dry-run"], "cannot remove 3 of 3 KV heads"),
        (["--layers", 1, "--out", "/proc/none/x"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, files: list[object], options: list[object], words: str, as_users_run_it: None
) -> None:
    code, out, errors = run("prune", *files, *options)
    assert (code, out) == (2, "")
    assert words in errors
    assert errors.count("\n") == 1


def test_names_cannot_break_the_card(run: Run, files: list[object], tmp_path: Path) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)>|`x`"
    Path(str(files[0])).rename(evil)
    code, _, _ = run("prune", evil, *files[1:], "--layers", 1, "--out", tmp_path / "out")
    assert code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card.replace("\\<img", "")


@pytest.mark.xdist_group("smollm2")
def test_on_smollm2_orders_differ_as_they_should(smollm2: LoadedModel) -> None:
    """A chosen layer costs less than the negative control's; generation works; nothing stays."""
    model: Any = smollm2.model
    tokenizer = smollm2.tokenizer
    first, second = packaged_halves()
    windows = Windows.of(model, tokenizer, first, window=256, limit=2)
    held = Windows.of(model, tokenizer, second, window=256, limit=2)
    calibration = calibrate_on(model, windows)
    assert calibration.block_influence.argmax() == 0  # no later layer changes its input as much
    losses = {"none": perplexity_of(nll_of_windows(model, held))}
    for order in ("bi", "bi_prime", "reverse"):
        chosen = plan(model, calibration, Amounts(layers=3, order=order))
        with layers_removed(model, chosen.layers):
            losses[order] = perplexity_of(nll_of_windows(model, held))
            ids = tokenizer("The next day", return_tensors="pt").input_ids
            with torch.inference_mode():
                assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > 3
    assert losses["none"] < losses["bi"] < losses["reverse"]
    assert losses["none"] < losses["bi_prime"] < losses["reverse"]
    assert perplexity_of(nll_of_windows(model, held)) == losses["none"]
