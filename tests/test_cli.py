import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

import tappa
from tappa.analysis import SCHEMA
from tappa.compression import METHODS, describe_methods
from tiny import save_tiny

TEXT = "It is a truth universally acknowledged, that a man"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with 6 heads and a context of 512 tokens."""
    return save_tiny(tmp_path_factory.mktemp("cli") / "model", num_hidden_layers=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 50 tokens, in a folder below which nothing else lies."""
    path = tmp_path / "in" / "text.txt"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_json_and_out(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    options = ("--device", "cpu", "--json", "--out", out)
    code, stdout, _ = run("analyze", model, "--text", text, *options)
    assert code == 0
    found = json.loads(stdout)
    assert (found["schema"], found["tokens"], found["bound_violations"]) == (SCHEMA, len(TEXT), 0)
    assert (found["model"]["name"], found["model"]["layers"]) == (str(model), 1)
    assert set(found["agreement"]) >= {"accuracy", "balanced_accuracy", "confusion"}
    assert [(h["layer"], h["head"]) for h in found["heads"]] == [(0, h) for h in range(6)]
    names = {"q_similarity", "k_similarity", "dominant_channel", "dominant_share", "period"}
    names |= {"sink_mass", "predictability", "explained", "observed"}
    assert all(names <= head.keys() for head in found["heads"])
    files = ["analysis.json", "asked.json", "heads.csv", "report.html", "views.npz"]
    assert files_below(tmp_path / "new") == [f"out/{name}" for name in files]
    assert tappa.Analysis.load(out / "analysis.json").summary() == found
    rows = list(csv.DictReader((out / "heads.csv").read_text().splitlines()))
    for row, head in zip(rows, found["heads"], strict=True):
        assert float(row["q_similarity"]) == head["q_similarity"]
        assert row["observed"] == head["observed"]


def test_the_terminal_shows_the_analysis(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--device", "cpu", "--tokens", "30", "--chunk", "16", "--out", out, "--no-report")
    code, stdout, _ = run("analyze", model, "--text", text, "--text", text, *options)
    assert code == 0
    assert "1 layers, 6 heads, 60 tokens in 2 prompt(s)" in " ".join(stdout.split())
    assert "bounds of the theorems: 0 violations" in stdout
    assert f"wrote {out / 'analysis.json'}, {out / 'heads.csv'}" in " ".join(stdout.split())
    assert files_below(out) == ["analysis.json", "asked.json", "heads.csv"]


def test_another_analysis_is_replaced_by_force_only(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", text.with_name("other.txt")
    other.write_text(TEXT[:29])

    def tokens_after(*options: object) -> tuple[int, str, int]:
        known = ("--device", "cpu", "--no-report", "--out", out)
        code, _, stderr = run("analyze", *options, *known)
        return code, stderr, sum(tappa.Analysis.load(out / "analysis.json").prompts)

    assert tokens_after(model, "--text", text) == (0, "", 50)
    assert tokens_after(model, "--text", text, "--chunk", 8) == (0, "", 50)
    code, stderr, tokens = tokens_after(model, "--text", other)
    assert (code, tokens, stderr.count("\n")) == (2, 50, 1)
    assert "holds another analysis (texts is ['text.txt (" in stderr
    assert "there and ['other.txt (" in stderr
    assert "--force" in stderr
    code, stderr, tokens = tokens_after(model, "--text", text, "--tokens", 31)
    assert (code, tokens) == (2, 50)
    assert "tokens is None there and 31 now" in stderr
    code, stderr, tokens = tokens_after(model / "no", "--text", text)
    assert (code, tokens) == (2, 50)
    assert f"model is '{model}' there" in stderr
    assert tokens_after(model, "--text", other, "--force") == (0, "", 29)
    (out / "asked.json").unlink()
    code, stderr, tokens = tokens_after(model, "--text", other)
    assert (code, tokens) == (2, 29)
    assert "it has no asked.json" in stderr


def test_a_start_imports_nothing_optional() -> None:
    """No libraries of extras, which take seconds, or may be missing."""
    optional = ["ray", "lm_eval", "datasets", "matplotlib", "plotly"]
    if Version(transformers.__version__) >= Version("5.3"):  # which imported it itself before
        optional.append("scipy.stats")
    code = f"import sys, tappa.cli; sys.exit(', '.join(x for x in {optional} if x in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stderr == b"\n"  # no name


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "tappa", "--version"], capture_output=True)
    assert done.stdout.decode() == f"tappa {tappa.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["--version"]])
def test_help_and_version(run: Run, arguments: list[str]) -> None:
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "")
    expected = f"tappa {tappa.__version__}\n" if arguments == ["--version"] else "Usage"
    assert expected in stdout


def refused(run: Run, folder: Path, *arguments: object) -> str:
    """The message of an analysis that cannot be made, which leaves no file in the folder."""
    before = files_below(folder)
    options = () if "--out" in arguments else ("--out", folder / "out")
    code, stdout, stderr = run("analyze", *arguments, *options)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    assert files_below(folder) == before
    return stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the text file"),
        (b"caf\xe9 au lait", "expected UTF-8 text, got byte 0xe9 at offset 3"),
        (b" \n", "expected text, got an empty file"),
        (b"", "expected text, got an empty file"),
        (b"short", "expected at least 8 tokens, the text has 5"),
    ],
)
def test_bad_text(
    run: Run, model: Path, text: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is None:
        text.unlink()
    else:
        text.write_bytes(content)
    assert message in refused(run, tmp_path, model, "--text", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "513"), "more than the model's context of 512 tokens"),
        (("--tokens", "3"), "expected tokens as a whole number from 8 on, got 3"),
        (
            ("--device", "warp"),
            "expected the device auto, all, tp, cpu, cuda or cuda:N, got",
        ),
        (("--dtype", "int4"), "expected the dtype auto, float32"),
    ],
)
def test_bad_options(
    run: Run, model: Path, text: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(run, tmp_path, model, "--text", text, *options)


def test_missing_model(run: Run, text: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert "no such model file or folder" in refused(run, tmp_path, missing, "--text", text)


def test_model_without_rope(run: Run, text: Path, tmp_path: Path) -> None:
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")
    assert "expected a model with rotary" in refused(run, tmp_path, gpt2, "--text", text)


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00 and then nothing of use", b"no gguf"])
def test_corrupt_gguf(run: Run, text: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "GGUF file" in refused(run, tmp_path, path, "--text", text)


def test_out_below_a_file(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    message = refused(run, tmp_path, model, "--text", text, "--out", text / "out")
    assert "cannot write to the folder" in message
    assert text.read_text() == TEXT


def test_generate_prints_text_and_figures(run: Run, model: Path, text: Path) -> None:
    options = ("--budget", 40, "--max-new-tokens", 7, "--device", "cpu")
    code, stdout, _ = run("generate", model, "--prompt-file", text, *options)
    assert code == 0
    assert all(word in stdout for word in ("tappa", "seen", "held", "at peak", "prefill", "decode"))


def test_generate_tells_what_it_will_take(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    """50 tokens; one layer of 3 KV heads, whose keys and values take 80 bytes a token."""
    method = ("--method", "streaming_llm", "--budget", 40, "--max-new-tokens", 7)
    options = ("--prompt-file", text, *method, "--device", "cpu", "--json")
    code, stdout, _ = run("generate", model, *options, "--chunk", 17, "--dry-run")
    told = json.loads(stdout)
    assert (code, told["prompt_tokens"], told["new_tokens"]) == (0, 50, 7)
    assert (told["full_nbytes"], told["held_nbytes"]) == (56 * 240, 40 * 240)
    parameters = sum(p.numel() for p in tappa.load(model).model.parameters())
    assert told["weights_nbytes"] == 4 * parameters
    code, stdout, _ = run("generate", model, *options, "--chunk", 17)
    found = json.loads(stdout)
    assert (code, found["new_tokens"]) == (0, 7)
    assert found["full_nbytes"] == told["full_nbytes"]
    assert found["peak_nbytes"] <= told["peak_nbytes"]
    assert found["nbytes"] <= told["held_nbytes"]
    # with weights that cannot be read
    (model_copy := tmp_path / "copy").mkdir()
    for file in model.iterdir():
        content = b"" if file.suffix == ".safetensors" else file.read_bytes()
        (model_copy / file.name).write_bytes(content)
    (model_copy / "model.safetensors").unlink()
    code, stdout, _ = run("generate", model_copy, *options[:-1], "--dry-run")
    assert code == 0
    assert "50 of the prompt, 7 new" in stdout
    assert "9.6 kB held at the end (71%)" in stdout
    long = ("--prompt-file", text, "--max-new-tokens", 9999, "--dry-run")
    code, _, errors = run("generate", model_copy, *long)
    assert (code, errors.count("\n")) == (2, 1)
    assert "a prompt of 50 tokens and 9999 new ones are more than the model's context" in errors


def test_generate_as_json(run: Run, model: Path, text: Path) -> None:
    options = ("--method", "snapkv", "--budget", "0.9", "--max-new-tokens", 7, "--json")
    code, stdout, _ = run("generate", model, "--prompt", text.read_text(), *options)
    assert code == 0
    found = json.loads(stdout)
    assert (found["method"], found["budget"], found["prompt_tokens"]) == ("snapkv", 0.9, len(TEXT))
    assert found["tokens_seen"] == len(TEXT) + found["new_tokens"] - 1
    assert 0 < found["nbytes"] <= found["peak_nbytes"]
    assert found["text"]


def test_generate_with_budgets_of_an_analysis(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    run("analyze", model, "--text", text, "--out", tmp_path / "out")
    file = tmp_path / "out" / "analysis.json"
    options = ("--budget", 40, "--max-new-tokens", 2, "--json", "--analysis", file)
    code, stdout, _ = run("generate", model, "--prompt-file", text, *options)
    assert code == 0
    assert json.loads(stdout)["new_tokens"] == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "snapk"), "did you mean 'snapkv'?"),
        (("--budget", "12"), "at least 32 tokens"),
        (("--budget", "1.5"), "at most 1.0"),
        (("--budget", "nan"), "above 0"),
        (("--budget", "lots"), "a budget such as 512 (tokens) or 0.1 (a share), got 'lots'"),
        (("--prompt-file", "/nowhere/x.txt"), "cannot read the text file /nowhere/x.txt"),
        (("--prompt", "a", "--prompt-file", "b"), "expected --prompt or --prompt-file, got both"),
        (("--prompt", ""), "at least 1 token"),
        (("--max-new-tokens", "500", "--prompt", "a" * 20), "context of 512 tokens"),
        (("--analysis", "/nowhere/a.json"), "cannot read the Analysis /nowhere/a.json"),
        (("--chat",), "chat template"),
        (("--compile", "--prompt", "a" * 20, "--device", "cpu"), "compiled steps need a GPU"),
    ],
)
def test_what_generate_refuses(run: Run, model: Path, options: tuple[str, ...], says: str) -> None:
    code, stdout, stderr = run("generate", model, *options)
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_methods(run: Run) -> None:
    code, stdout, _ = run("methods")
    assert code == 0
    for name in METHODS:
        assert name in stdout
    assert json.loads(run("methods", "--json")[1]) == describe_methods()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("analyze", "--tokens", "abc"), "'--tokens'"),
        (("analyze", "--chunk", "7"), "'--chunk'"),
        (("analyze", "--bogus"), "--bogus"),
        (("analyse",), "analyse"),
    ],
)
def test_arguments_that_do_not_do_are_one_line(
    run: Run, arguments: tuple[str, ...], says: str
) -> None:
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert says in stderr


def test_a_failed_run_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert run("analyze", tmp_path / "nope.gguf", "--out", out)[0] == 2
    assert not (tmp_path / "new").exists()
