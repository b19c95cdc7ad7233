"""The Python of README and of the how-tos runs as it stands, page by page from top to bottom."""

import re
from pathlib import Path

import pytest

from tappa.cache_argument import cache_name
from tiny import tiny_model

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
