"""The report page of a model of 32 x 32 heads with random weights: its size, opening, clicks."""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from playwright.sync_api import Page, sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

import tappa
from tappa.report.looking import look
from tappa.report.page import write_report
from tappa.report.views import FILE, save_views
from tappa.texts import packaged_text

HEADS = 32  # and as many layers
TOKENS = 512
OPENINGS = 5
CLICKS = 20
PAINTED = "() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"


def synthetic(folder: Path) -> Path:
    """A report of random weights, with maps and a text, in a folder."""
    _, tokenizer = tappa.load(device="cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16 * HEADS,
        intermediate_size=32 * HEADS,
        num_hidden_layers=HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        initializer_range=0.2,  # large enough that attention is far from uniform
    )
    model = LlamaForCausalLM(config).eval()
    text = packaged_text()
    path = tappa.analyze(model, tokenizer, text, tokens=TOKENS).save(folder / "analysis.json")
    save_views(folder / FILE, [look(model, tokenizer, text)])
    return write_report(folder / "report.html", [path])


def opening(page: Page, file: Path) -> float:
    """Seconds until the atlas and a card are there."""
    start = time.perf_counter()
    page.goto(f"file://{file}")
    page.wait_for_selector("html[data-ready]")
    return time.perf_counter() - start


def click(page: Page, layer: int, head: int) -> float:
    """Seconds from a click on a head until its card is painted."""
    box = page.locator("#atlas .nsewdrag").bounding_box()
    assert box is not None
    x, y = ((i + 0.5) / HEADS for i in (head, layer))
    start = time.perf_counter()
    page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    page.locator("#card-title", has_text=f"L{layer} H{head}:").wait_for()
    page.evaluate(PAINTED)
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most."""
    shown = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(value, 3) for name, value in shown.items()} | {"n": len(seconds)}


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("needs chromium (apt install chromium)")
    found: dict[str, Any] = {"benchmark": "report", "heads": HEADS * HEADS, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        file = synthetic(Path(folder))
        found["page_bytes"] = file.stat().st_size
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found["browser"] = f"chromium {browser.version}"
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        found["open_seconds"] = spread([opening(page, file) for _ in range(OPENINGS)])
        page.wait_for_selector("html[data-ready=all]")
        places = [(7 * i % HEADS, 11 * i % HEADS) for i in range(1, CLICKS + 1)]
        found["click_seconds"] = spread([click(page, *place) for place in places])
        browser.close()
    print(json.dumps(found | describe()))


if __name__ == "__main__":
    main()
