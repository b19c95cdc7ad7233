"""The report page in a real browser (Debian's chromium): clicks, keys, widths, errors."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tappa
from tappa.report.page import write_report
from tappa.report.views import look
from tiny import tiny_model, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9
HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>'

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium (apt install chromium) and playwright",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, whose name and text are hostile."""
    folder = tmp_path_factory.mktemp("page")
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    found = tappa.analyze(model, tokenizer, TEXT, tokens=150)
    raw = json.loads(found.save(folder / "analysis.json").read_text())
    raw["model"]["name"] = HOSTILE
    (folder / "analysis.json").write_text(json.dumps(raw))
    views = look(model, tokenizer, HOSTILE + TEXT, tokens=200)
    views.tokens[1] = HOSTILE
    return write_report(folder / "report.html", [folder / "analysis.json"], views=views)


def opened(browser: Any, file: Path, width: int = 1280) -> tuple[Any, list[str]]:
    page, errors = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(f"file://{file}")
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    return page, errors


@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_works(browser: Any, page_file: Path, width: int) -> None:
    page, errors = opened(browser, page_file, width)
    assert page.inner_text("#title") == HOSTILE
    assert page.is_hidden("#card")
    cell = page.locator("#atlas .nsewdrag").bounding_box()  # two layers of six heads
    page.mouse.click(cell["x"] + cell["width"] * 2.5 / 6, cell["y"] + cell["height"] * 0.75)
    page.wait_for_selector("#card:not([hidden])")
    assert page.inner_text("#card-title").startswith("L1 H2")
    assert page.is_visible("#map")
    page.focus("#atlas")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#card-title").startswith("L1 H3")
    assert page.evaluate("location.hash") == "#L1H3"
    page.select_option("#colour", "disagree")
    assert "labels disagree" in page.text_content("#atlas .gtitle")
    letters = page.locator("#atlas .heatmap-label").all_text_contents()
    assert len(letters) == 12
    assert set(letters) <= set("RSPL·")
    page.select_option("#colour", "kept:snapkv")
    kept = page.evaluate("document.getElementById('atlas').data[0].z")
    assert sum(map(sum, kept)) == 2 * 6 * 50  # 50 in each KV head, which two of six heads read
    page.fill("#find", "L0 H5")
    assert page.inner_text("#card-title").startswith("L0 H5")
    assert page.inner_text("#list .hint") == "1 heads"
    page.fill("#find", "")
    page.select_option("#sort", "q_similarity")
    assert page.locator("#list button").count() == 12
    page.hover("#tokens span[data-token='60']")
    assert page.inner_text("#looks").startswith("L0 H5 at ")
    page.select_option("#method", "streaming_llm")
    assert "tokens in L0 H5" in page.inner_text("#kept-hint")
    assert page.locator("#tokens span.gone").count() == 150
    budgets = page.evaluate("document.getElementById('budgets').data.map(x => [x.name, x.y])")
    assert {name: sum(y) for name, y in budgets}["snapkv"] == 2 * 50  # layers, a quarter of 200
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []


def test_a_link_opens_a_head(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, Path(f"{page_file}#L1H4"))
    assert page.inner_text("#card-title").startswith("L1 H4")
    assert errors == []


def test_a_thousand_heads_react(browser: Any, page_file: Path) -> None:
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    layers, heads = [], []
    for layer in range(32):
        first = json.loads(json.dumps(raw["statistics"][0]))
        for name, value in first["sums"].items():
            if isinstance(value, list) and len(value) == 6:
                first["sums"][name] = (value * 6)[:32]
        layers.append(first | {"layer": layer})
        heads += [raw["heads"][h % 12] | {"layer": layer, "head": h} for h in range(32)]
    file = page_file.parent / "large.json"
    file.write_text(json.dumps(raw | {"heads": heads, "statistics": layers}))
    page, errors = opened(browser, write_report(page_file.parent / "large.html", [file]))
    assert page.inner_text("#list .hint") == "1024 heads"
    cell = page.locator("#atlas .nsewdrag").bounding_box()
    page.mouse.click(cell["x"] + cell["width"] * 16.5 / 32, cell["y"] + cell["height"] * 16.5 / 32)
    page.wait_for_selector("#card:not([hidden])", timeout=10_000)
    assert page.inner_text("#card-title").startswith("L16 H16")
    assert errors == []


def test_a_page_without_heads_opens(browser: Any, page_file: Path) -> None:
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    file = page_file.parent / "none.json"
    file.write_text(json.dumps(raw | {"heads": [], "statistics": []}))
    page, errors = opened(browser, write_report(page_file.parent / "none.html", [file]))
    assert "No heads" in page.inner_text("#atlas")
    assert "has no heads" in page.text_content("#notes")
    assert errors == []
