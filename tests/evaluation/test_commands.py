"""`tappa eval` and `tappa lm-eval`, as they are typed: in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tappa.evaluation.choice_suite import write_choice_suite
from tiny import save_tiny

TAPPA = (sys.executable, "-m", "tappa")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with a context of 512 tokens."""
    return save_tiny(tmp_path_factory.mktemp("eval") / "model", num_hidden_layers=1)


def typed(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TAPPA_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*TAPPA, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
        timeout=240,
    )


def test_eval_writes_tables_and_goes_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = [
        *("--methods", "full,snapkv,cake(gamma=3.0)", "--budgets", "40,0.5"),
        *("--tasks", "fidelity,choice_arithmetic", "--lengths", "300", "--limit", "2"),
    ]
    done = typed("eval", model, *options, "-o", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| cake(gamma=3.0) |" in done.stdout
    assert "2 samples" not in done.stdout
    assert "4 samples answered, 0 were there already" in done.stdout
    assert "read once for 5 cells" in done.stdout
    again = typed("eval", model, *options, "-o", out, folder=tmp_path)
    assert "0 samples answered, 4 were there already" in again.stdout
    assert again.stdout.split("### Memory")[0] == done.stdout.split("### Memory")[0]
    frame = pd.read_parquet(out / "samples.parquet")
    assert set(frame["task"]) == {"fidelity", "choice_arithmetic"}
    tables = json.loads((out / "results.json").read_text())["tables"]
    assert [table["baseline"] for table in tables] == ["full", "full"]
    other = typed("eval", model, *options, "--seed", "1", "-o", out, folder=tmp_path)
    assert other.returncode == 2
    assert "results of another grid: seed is 0 there and 1 now" in other.stderr


def test_a_run_that_was_refused_does_not_block_its_folder(model: Path, tmp_path: Path) -> None:
    """The same folder takes other options as long as it has no answers."""
    (tmp_path / "empty").mkdir()
    options: list[object] = [
        "--methods",
        "full",
        "--budgets",
        "40",
        "--limit",
        "1",
        "--tasks",
        "fidelity",
    ]
    options += ["-o", tmp_path / "out", "--data", tmp_path / "empty"]
    refused = typed("eval", model, *options, "--lengths", "300", folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expected *.txt files" in refused.stderr
    assert (tmp_path / "out" / "grid.json").exists()
    (tmp_path / "empty" / "a.txt").write_text("It is a truth universally acknowledged. " * 90)
    done = typed("eval", model, *options, "--lengths", "200", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert kept["asked"]["lengths"] == [200]


def test_lm_eval_knows_tappa(model: Path, tmp_path: Path) -> None:
    write_choice_suite(tmp_path / "suite", per_task=3)
    done = typed(
        *("lm-eval", "--model", "tappa", "--tasks", "choice_arithmetic", "--limit", 2),
        *("--model_args", f"pretrained={model},method=snapkv,budget=64"),
        *("--include_path", tmp_path / "suite", "--output_path", tmp_path / "out"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "|choice_arithmetic|" in done.stdout.replace(" ", "")
    assert "|Tasks|Version|" in done.stdout.replace(
        " ", ""
    )  # headings of lm-eval's table, not letters
    assert "tappa (" in done.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))


@pytest.mark.parametrize("option", ["--include-path", "--include_path"])
def test_the_task_of_the_docs(model: Path, tmp_path: Path, option: str) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    folder = tmp_path / "my-tasks"
    folder.mkdir()
    task = docs.split("```yaml\n")[1].split("```")[0]
    (folder / "capitals.yaml").write_text(task)
    (folder / "capitals.jsonl").write_text(docs.split("```json\n")[1].split("```")[0])
    options = ("--methods", "full,snapkv", "--budgets", "36", option, "my-tasks")
    wrong = typed("eval", model, *options, "--tasks", "capitels", folder=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "did you mean capitals?" in wrong.stderr
    done = typed("eval", model, *options, "--tasks", "capitals", "-o", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "capitals" in done.stdout
    frame = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    assert set(frame["task"]) == {"capitals"}
    assert len(frame) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--include-path", "nowhere"), "expected a folder of lm-eval task files, got nowhere"),
        (("--include-path", "."), "expected lm-eval task files (*.yaml) in ., got none"),
        (("--methods", "snapvk"), "did you mean 'snapkv'"),
        (("--budgets", "5"), "at least 36 tokens"),
        (("--budgets", "a"), "expected a budget such as"),
        (("--tasks", "fidelty"), "did you mean fidelity"),
        (("--lengths", "0"), "expected a length"),
        (("--shard", "4/4"), "expected a shard"),
        (("--half", "x"), "tune or report"),
        (("--baseline", "adakv"), "baseline out of"),
        (("--data", "nowhere"), "expected a folder of data"),
        (("--limit", "0"), "greater than or equal to 1"),
    ],
)
def test_bad_arguments_are_one_line(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = typed("eval", model, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "results").exists()


def test_without_the_extra_it_says_so(model: Path, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['lm_eval'] = None; from tappa.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "eval", str(model)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'tappa[eval]'" in done.stderr
