"""The Python of README and of the how-tos runs as it stands, page by page from top to bottom."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tappa.cache_argument import cache_name
from tiny import save_tiny, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def with_python() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python")]


def test_pages_have_code() -> None:
    assert {"README", "chat", "long-prompts", "prune-and-train"} <= {p.stem for p in with_python()}


@pytest.mark.parametrize("page", with_python(), ids=lambda page: page.stem)
def test_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argument = cache_name(tiny_model("llama"))  # the pages have the newest name
    names: dict[str, object] = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python")):
        code = re.sub(r"\bcache=", f"{argument}=", text)
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    assert capsys.readouterr().out.strip()


def test_a_task_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and the command of the how-to, on a tiny model."""
    page = ROOT / "docs" / "how-to" / "own-task.md"
    command = next(
        line for line in page.read_text("utf-8").splitlines() if "--include-path" in line
    )
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/questions.jsonl").write_text(blocks(page, "json")[0])
    Path("mine/my_questions.yaml").write_text(blocks(page, "yaml")[0])
    model = save_tiny(tmp_path / "model")
    arguments = shlex.split(command.replace("MODEL", str(model)))
    assert arguments[:2] == ["tappa", "eval"]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(Path("my-results/results.json").read_text())
    answers = list(Path("my-results/samples/my_questions").glob("*.json"))
    assert results["tables"]
    assert len(answers) == len(blocks(page, "json")[0].splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
