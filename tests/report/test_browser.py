"""The report page in a real browser (Debian's chromium): clicks, keys, widths, errors."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tappa
from result_files import FILES, HOSTILE, changed, leave
from tappa.columns import COLUMNS
from tappa.report.content import FIGURES, TIGHTNESS
from tappa.report.looking import look
from tappa.report.page import write_report
from tappa.report.views import FILE, save_views
from tiny import tiny_model, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium (Debian: apt-get install chromium) and playwright (the extra dev)",
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
    views = look(model, tokenizer, HOSTILE + TEXT, title=HOSTILE, tokens=200)
    views.tokens[1] = HOSTILE
    other = look(model, tokenizer, TEXT[20:], title="another", tokens=90)
    save_views(folder / FILE, [views, other])
    return write_report(folder / "report.html", [folder / "analysis.json"])


def opened(browser: Any, file: Path, width: int = 1280) -> tuple[Any, list[str]]:
    page, errors = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(f"file://{file}")
    page.wait_for_selector("html[data-ready=all]", timeout=60_000)
    return page, errors


def unfold(page: Any) -> None:
    """Open all that a narrow page folds, as a reader does."""
    for part in page.locator("main > section > details").all():
        if part.is_visible() and part.get_attribute("open") is None:
            part.locator("summary").first.click()


def click_head(page: Any, across: float, down: float) -> None:
    """Click the atlas at shares of its width and height."""
    cells = page.locator("#atlas .nsewdrag")
    box = cells.bounding_box()
    cells.click(position={"x": box["width"] * across, "y": box["height"] * down})


@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_works(browser: Any, page_file: Path, width: int) -> None:
    page, errors = opened(browser, page_file, width)
    unfold(page)
    assert page.inner_text("#title") == HOSTILE
    assert page.is_visible("#card")  # of a head that is worth a look
    click_head(page, 2.5 / 6, 0.75)  # of two layers of six heads
    page.locator("#card-title", has_text="L1 H2").wait_for()
    assert page.is_visible("#map")
    curves = page.evaluate("document.getElementById('persistence').data.map(x => x.y.length)")
    assert curves == [6] * 4  # 1, 2, 4, ..., 32 of 200 tokens; observed and expected
    page.hover("#map", position={"x": 10, "y": 100})
    assert re.fullmatch(r"query \d+ .* → key \d+ .*, \d+ back", page.inner_text("#map-hint"))
    page.focus("#atlas")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#card-title").startswith("L1 H3")
    assert page.evaluate("location.hash") == "#L1H3"
    page.select_option("#colour", "disagree")
    assert page.locator("#notes[open]").count() == 0  # nothing is damaged
    assert "labels disagree" in page.inner_text("figure:has(#atlas) figcaption")
    letters = page.locator("#atlas .heatmap-label").all_text_contents()
    assert len(letters) == 12
    assert set(letters) <= set("RSPL·")
    page.select_option("#colour", "kept:snapkv")
    kept = page.evaluate("document.getElementById('atlas').data[0].z")
    caption = page.inner_text("figure:has(#atlas) figcaption")
    assert caption == "tokens kept by snapkv, at a budget of 50 tokens a head"
    assert sum(map(sum, kept)) == 2 * 6 * 50  # 50 in each KV head, which two of six heads read
    page.fill("#find", "L0 H5")
    assert page.inner_text("#card-title").startswith("L0 H5")
    assert page.inner_text("#list .hint") == "1 head"
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


def needle(page: Any) -> list[int]:
    """The tokens that are chosen."""
    spans = page.locator("#tokens span.needle")
    return [int(x) for x in spans.evaluate_all("all => all.map(x => x.dataset.token)")]


def test_a_needle_is_chosen_by_phrase_mouse_and_keys(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, page_file)
    assert page.locator("#tokens span.needle").count() == 8  # where methods differ most
    with np.load(page_file.parent / FILE) as file:
        kept, tokens = file["0.kept"], [str(x) for x in file["0.tokens"]]
        methods = [str(x) for x in file["0.methods"]]
    page.fill("#phrase", "SINGLE MAN")
    first = next(i for i in range(len(tokens)) if "".join(tokens[i:]).startswith("single man"))
    last = next(i for i in range(len(tokens)) if "".join(tokens[first : i + 1]) == "single man")
    assert needle(page) == list(range(first, last + 1))
    shares = kept[..., first : last + 1].mean((2, 3))
    drawn = page.evaluate("document.getElementById('needle-methods').data.map(x => x.y)")
    assert np.allclose(np.array(drawn).T, shares)
    page.select_option("#method", "snapkv")
    page.select_option("#budget", index=0)
    words = page.inner_text("#needle-words")
    assert f"snapkv at 40 tokens a head: {shares[methods.index('snapkv'), 0]:.0%} of it" in words
    heads = page.evaluate("document.getElementById('needle-heads').data[0].z")
    mine = kept[methods.index("snapkv"), 0, :, first : last + 1].mean(-1).reshape(2, 3)
    assert np.allclose(np.array(heads), mine.T)  # KV heads by layers
    places = [i for i, token in enumerate(tokens) if "t" in token.lower()]
    page.fill("#phrase", "T")
    for place in [*places, places[0]]:  # the next one, and round again
        assert needle(page) == [place]
        page.press("#phrase", "Enter")
    page.fill("#phrase", "not there")
    assert page.inner_text("#phrase-hint") == "not in this text"
    assert (needle(page), page.is_visible("#needle-found")) == ([], False)
    page.select_option("#budget", index=1)
    assert needle(page) == []
    page.click("#tokens span[data-token='70']")
    page.click("#tokens span[data-token='73']", modifiers=["Shift"])
    assert needle(page) == [70, 71, 72, 73]
    assert (page.inner_text("#phrase-hint"), page.is_visible("#needle-found")) == ("", True)
    page.keyboard.press("Shift+ArrowRight")  # goes on with the same stretch
    assert needle(page) == [70, 71, 72, 73, 74]
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.token") == "0"
    page.keyboard.press("ArrowDown")
    below = page.locator(":focus").bounding_box()
    first = page.locator("#tokens span[data-token='0']").bounding_box()
    assert below["y"] > first["y"]
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.token") == str(len(tokens) - 1)
    page.focus("#tokens span[data-token='73']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert needle(page) == [74, 75, 76]
    assert errors == []


def test_another_text_is_shown(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, page_file)
    assert page.locator("#text option").all_text_contents() == [HOSTILE, "another"]
    page.select_option("#text", "1")
    page.locator("#map-hint", has_text="90 tokens of another").wait_for()
    assert page.locator("#tokens span").count() == 90
    assert errors == []


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("width", [1280, 380])
def test_results_and_comparisons_are_shown(
    browser: Any, page_file: Path, tmp_path: Path, width: int, hostile: bool
) -> None:
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    after = raw | {"heads": [head for head in raw["heads"] if head["layer"] == 0]}
    after |= {"statistics": raw["statistics"][:1], "model": {"name": HOSTILE if hostile else "x"}}
    (tmp_path / "after.json").write_text(json.dumps(after))
    files = {name: changed(x, str, HOSTILE) if hostile else x for name, x in FILES.items()}
    results = leave(tmp_path / "results", files)
    analyses = [page_file.parent / "analysis.json", tmp_path / "after.json"]
    page, errors = opened(browser, write_report(tmp_path / "r.html", analyses, results), width)
    unfold(page)
    assert page.text_content("#notes") is not None
    assert "cannot be shown" not in str(page.text_content("#notes"))
    words = page.inner_text("#compare-words")
    assert words == "6 heads exist in both; 6 keep their label."  # layer 1 was removed
    differences = page.evaluate("document.getElementById('difference').data[0].z")
    assert differences == [[0] * 6, [None] * 6]
    assert page.is_visible("#needs")
    title = page.evaluate("document.getElementById('compare').layout.xaxis.title.text")
    assert title == "layer"  # the last one was removed, so that numbers stay
    for part in ("results", "theory"):
        assert page.is_visible(f"#{part}-part")
        assert page.locator(f"#{part}-part .main-svg").count() >= 5
    if not hostile:
        captions = " ".join(page.locator("#results-part figcaption").all_inner_texts())
        for what in ("MB of keys and values", "Seconds to choose", "Tokens written a second"):
            assert what in captions
        page.locator("#results select").nth(1).select_option("nbytes")
        drawn = page.locator("#results .plot").first.evaluate("x => x.data.map(y => [y.name, y.x])")
        assert ["tappa", [0.064, 0.128]] in drawn
        assert "within 1%" in page.inner_text("#theory-part")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() == 0
    assert errors == []


@pytest.mark.parametrize(
    ("kind", "value"), [(float, None), (float, "many"), (list, {}), (list, None), (dict, 7)]
)
def test_results_that_hold_other_things_do_not_stop_the_page(
    browser: Any, page_file: Path, tmp_path: Path, kind: type, value: Any
) -> None:
    files = {
        name: {key: changed_inside(x, kind, value) for key, x in content.items()}
        for name, content in FILES.items()
    }
    results = leave(tmp_path / "results", files)
    analysis = page_file.parent / "analysis.json"
    page, errors = opened(browser, write_report(tmp_path / "r.html", [analysis], results))
    page.fill("#find", "L1 H5")
    assert page.inner_text("#card-title").startswith("L1 H5")
    assert errors == []


def changed_inside(content: Any, kind: type, value: Any) -> Any:
    """Lists and dictionaries too, which `changed` walks through."""
    return value if type(content) is kind else changed(content, kind, value)


def test_a_long_prompt_and_an_old_file_open(browser: Any, page_file: Path, tmp_path: Path) -> None:
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    old = raw | {"schema": "tappa.analysis/0", "prompts": [131_072], "statistics": None}
    old["heads"] = [
        {key: head[key] for key in ("layer", "head", "q_similarity")} for head in raw["heads"]
    ]
    (tmp_path / "old.json").write_text(json.dumps(old))
    page, errors = opened(browser, write_report(tmp_path / "old.html", [tmp_path / "old.json"]))
    assert "131,072 tokens in 1 prompt" in page.inner_text("#summary")
    page.fill("#find", "L1 H3")
    assert page.inner_text("#card-title") == "L1 H3: ?"
    notes = str(page.text_content("#notes"))
    for words in ("tappa.analysis/0", "lacks", "no lag profiles", "no attention maps"):
        assert words in notes
    assert page.is_hidden("#text-part")
    assert errors == []


def test_a_link_opens_a_head(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, Path(f"{page_file}#L1H4"), width=380)
    assert page.inner_text("#card-title").startswith("L1 H4")
    title = page.locator("#card-title").bounding_box()
    assert 0 <= title["y"] < 900  # in sight
    page.evaluate("location.hash = '#L0H3'")
    page.locator("#card-title", has_text="L0 H3").wait_for()
    page.evaluate("location.hash = '#L9H9'")  # there is none
    assert page.inner_text("#card-title").startswith("L0 H3")
    assert errors == []


LABELS = ["periodic", "sequential", "periodic", "re-access", "sequential", "sequential"]


@pytest.fixture(scope="module")
def labelled_file(page_file: Path) -> Path:
    """Two layers of six heads with labels that are known, and none that is seasonal."""
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    for number, head in enumerate(raw["heads"]):
        head |= {"observed": LABELS[number % 6], "explained": "periodic", "period": 64.0 - number}
        head |= {"measured_period": 7.0, "measured_channel": 1, "dominant_channel": 2}
    file = page_file.parent / "labelled.json"
    file.write_text(json.dumps(raw))
    return write_report(file.with_suffix(".html"), [file])


def cells(page: Any) -> list[list[bool]]:
    """Which cells of the atlas are drawn; a label's letters take two traces."""
    drawn = page.evaluate("document.getElementById('atlas').data.map(x => x.z)")
    return [
        [any(part[i][j] is not None for part in drawn) for j in range(6)]
        for i in range(len(drawn[0]))
    ]


def colour_range(page: Any) -> list[float]:
    """The values that the first and the last colour of the atlas stand for."""
    trace = "document.getElementById('atlas').data[0]"
    return list(page.evaluate(f"[{trace}.zmin, {trace}.zmax]"))


@pytest.mark.parametrize("colour", ["observed", "disagree", "q_similarity"])
def test_a_filter_leaves_cells_empty(browser: Any, labelled_file: Path, colour: str) -> None:
    page, errors = opened(browser, labelled_file)
    page.select_option("#colour", colour)
    of_all = colour_range(page)
    page.select_option("#label", "periodic")
    assert colour_range(page) == of_all
    assert of_all[0] < of_all[1]
    assert cells(page) == [[True, False, True, False, False, False]] * 2
    letters = page.locator("#atlas .heatmap-label").all_text_contents()
    assert [x for x in letters if x] == ([] if colour == "q_similarity" else ["P"] * 4)
    page.focus("#atlas")
    page.evaluate("location.hash = '#L0H0'")
    page.locator("#card-title", has_text="L0 H0").wait_for()
    page.keyboard.press("ArrowRight")  # over the heads that are not shown
    assert page.inner_text("#card-title").startswith("L0 H2")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#card-title").startswith("L1 H2")
    page.select_option("#label", "seasonal")
    assert cells(page) == [[False] * 6] * 2
    assert page.inner_text("#list .hint") == "no head"
    assert "no head" in page.inner_text("figure:has(#atlas) figcaption")
    axes = "(x => [x.xaxis.range, x.yaxis.range])(document.getElementById('atlas')._fullLayout)"
    assert page.evaluate(axes) == [[-0.5, 5.5], [1.5, -0.5]]
    assert errors == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        *(("1 5", "1 head"), ("L1H5", "1 head"), ("1.5", "1 head"), ("l1, h5", "1 head")),
        *(("L1", "6 heads"), ("L1 H", "6 heads"), ("L", "12 heads"), ("H5", "2 heads")),
        *(("L99", "no head"), ("periodic L1", "2 heads"), ("re-acc", "2 heads")),
    ],
)
def test_heads_are_found(browser: Any, labelled_file: Path, words: str, found: str) -> None:
    page, errors = opened(browser, labelled_file)
    page.fill("#find", words)
    assert page.inner_text("#list .hint") == found
    assert errors == []


def test_the_list_is_one_stop_and_is_sorted(browser: Any, labelled_file: Path) -> None:
    page, errors = opened(browser, labelled_file)
    page.select_option("#sort", "period")
    first = page.locator("#list button").first
    assert first.locator("b").inner_text() == "L0 H0 period 64"
    page.check("#ascending")
    assert first.locator("b").inner_text() == "L1 H5 period 53"
    assert page.locator("#list button[tabindex='0']").count() == 1
    page.locator("#list button[tabindex='0']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#card-title").startswith("L1 H4")
    assert page.locator("#list button[tabindex='0']").count() == 1
    page.keyboard.press("End")
    assert page.locator(":focus b").inner_text() == "L0 H0 period 64"
    shares = page.locator("#mix .bar span").evaluate_all("all => all.map(x => x.clientWidth)")
    assert [round(6 * share / sum(shares)) for share in shares] == [1, 3, 2]  # R, S, P
    page.fill("#find", "0 0")
    words = page.inner_text("#card-sentence")
    assert "as channel 1 turns. " in words
    assert "over all channels: channel 2 holds most energy, but turns too slowly to show." in words
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
    model = raw["model"] | {"layers": 32, "heads": 32}
    file.write_text(json.dumps(raw | {"model": model, "heads": heads, "statistics": layers}))
    page, errors = opened(browser, write_report(page_file.parent / "large.html", [file]))
    assert page.inner_text("#list .hint") == "1024 heads"
    click_head(page, 16.5 / 32, 16.5 / 32)
    page.locator("#card-title", has_text="L16 H16").wait_for(timeout=10_000)
    narrow, _ = opened(browser, page_file.parent / "large.html", width=390)
    assert height(narrow) < 4000
    assert errors == []


def test_a_page_without_heads_opens(browser: Any, page_file: Path) -> None:
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    file = page_file.parent / "none.json"
    file.write_text(json.dumps(raw | {"heads": [], "statistics": []}))
    page, errors = opened(browser, write_report(page_file.parent / "none.html", [file]))
    assert "No heads" in page.inner_text("#atlas")
    assert "has no heads" in page.inner_text("#notes li >> nth=0")  # unfolded
    assert page.is_hidden("#layers")
    assert errors == []


def height(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollHeight"))


def test_a_phone_shows_a_short_page_that_unfolds(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, page_file, width=390)
    assert height(page) < 2500
    assert page.is_hidden("#layers")
    page.click("nav a[href='#model-part']")
    page.locator("#layers").wait_for()
    plot = page.locator("#layers .main-svg").first
    figure = page.locator("figure:has(#layers)")
    page.wait_for_function("document.querySelector('#layers .main-svg').clientWidth <= 390")
    assert plot.bounding_box()["width"] == pytest.approx(figure.bounding_box()["width"], abs=2)
    unfold(page)
    page.locator("#all-figures > summary").click()
    assert page.is_visible("#tokens")
    assert page.is_visible("#figures")
    assert height(page) < 5000
    cards = page.locator("#card .cards")
    assert cards.evaluate("box => box.scrollWidth > 2 * box.clientWidth")  # side by side
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide, _ = opened(browser, page_file)
    assert wide.locator("main details:not([open])").count() == 0
    assert errors == []


def test_words_tell_what_they_mean(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, page_file)
    assert page.is_hidden("#meaning")
    names = page.locator("#figures dfn").all_inner_texts()
    assert names[:1] == ["q-similarity S (before RoPE)"]
    assert len(names) == len(FIGURES) + len(TIGHTNESS)
    page.hover("#figures dfn >> text=channel's alignment")
    assert page.inner_text("#meaning") == COLUMNS["alignment"].meaning
    page.hover("#title")
    assert page.is_hidden("#meaning")
    page.focus("figure:has(#atlas) dfn")
    assert page.inner_text("#meaning") == COLUMNS["sink_mass"].meaning
    page.keyboard.press("Escape")
    assert page.is_hidden("#meaning")
    word = page.locator("#card-sentence dfn")
    word.click()  # or a tap
    assert (word.inner_text(), page.inner_text("#meaning")) == (
        "S",
        COLUMNS["q_similarity"].meaning,
    )
    page.click("#card-title")
    assert page.is_hidden("#meaning")
    page.hover("#figures dfn >> text=bound ÷ actual, 5.1")
    assert page.inner_text("#meaning") == COLUMNS["tightness_vertical"].meaning
    page.hover("figure:has(#persistence) dfn")
    assert page.inner_text("#meaning") == COLUMNS["vertical"].meaning
    assert errors == []


def test_every_picture_can_be_saved(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, Path(f"{page_file}#L1H4"))
    figures = page.locator("figure:visible")
    assert page.locator("figure:visible .save").count() == figures.count() >= 9
    stem = re.sub(r"[^\w.]+", "-", HOSTILE).strip("-")
    for figure, file in (("lags", "L1H4-lags"), ("atlas", "atlas-sink_mass"), ("map", "L1H4-map")):
        for kind, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
            with page.expect_download() as download:
                page.locator(f"figure:has(#{figure}) .save button", has_text=kind).click()
            found = download.value
            assert found.suggested_filename == f"{stem}-{file}.{kind.lower()}"
            assert Path(found.path()).read_bytes().startswith(start)
    assert errors == []


def test_the_atlas_starts_with_a_statistic(browser: Any, page_file: Path) -> None:
    page, errors = opened(browser, page_file)
    raw = json.loads((page_file.parent / "analysis.json").read_text())
    drawn = page.evaluate("document.getElementById('atlas').data[0].z")
    assert page.input_value("#colour") == "sink_mass"
    masses = [head["sink_mass"] for head in raw["heads"]]
    np.testing.assert_allclose(np.array(drawn).ravel(), masses, rtol=1e-3)
    page.select_option("#colour", "observed")
    assert page.locator("#atlas .heatmap-label").count() == 12
    assert errors == []
