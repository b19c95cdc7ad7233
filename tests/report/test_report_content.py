"""What a report holds: pictures against naive ones, untrusted text, files that lack things."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tappa
from result_files import HOSTILE, TABLE, leave
from tappa.attention_profile import Attention
from tappa.capture import LayerView, prefill
from tappa.errors import OutputError, ReportError
from tappa.patterns import LABELS
from tappa.query_model import expected_persistence
from tappa.report.choosing import chosen_heads
from tappa.report.content import FIGURES, LAGS, RESULTS, content_of, origins
from tappa.report.looking import ROWS, TOP, look, persistence_curves, picture
from tappa.report.page import render, write_report
from tappa.report.print_heads import clearest
from tappa.report.prints import VERIFIED, figures
from tappa.report.views import CURVES, FILE, LEVELS, STRETCH, Views, load_views, save_views
from tappa.theory import spread_rows
from tiny import save_tiny, tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tappa.analyze(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=150)
    return found.save(tmp_path_factory.mktemp("report") / "analysis.json")


def unpacked(page: str, name: str = "data") -> dict[str, Any]:
    packed = re.search(rf'id="{name}">([^<]*)</script>', page)
    assert packed
    return dict(json.loads(gzip.decompress(base64.b64decode(packed[1]))))


@pytest.fixture(scope="module")
def views() -> Views:
    """Of 170 tokens, two layers of six query and three KV heads."""
    return look(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=170, methods=["snapkv", "h2o"])


@pytest.mark.parametrize("window", [None, 19])
def test_pictures_are_those_of_the_whole_matrix(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, size, heads = 151, 13, 6
    queries = torch.randn(heads, tokens, 10, generator=generator)
    keys = torch.randn(2, tokens, 10, generator=generator)
    attention = Attention(0.7, window)
    maps, best, weights = picture(queries, keys, attention, size)
    at = torch.arange(tokens)
    seen = attention.visible(at, at)
    logits = attention.logits(queries, keys.repeat_interleave(3, 0).mT)
    full = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    cell = at * size // tokens
    mean = torch.zeros(heads, size, size)
    for i in range(size):
        for j in range(size):
            inside = (cell == i)[:, None] & (cell == j) & seen
            if inside.any():
                mean[:, i, j] = full[:, inside].mean(1)
    share = mean / mean.amax((1, 2), keepdim=True)
    expected = LEVELS * torch.log1p(STRETCH * share) / np.log1p(STRETCH)
    assert float((maps.float() - expected).abs().max()) <= 0.51
    top = full.topk(TOP, -1)
    assert float((weights.float() - top.values * 100).abs().max()) <= 0.501
    many = top.values[..., -1] > 0
    chosen = full.gather(-1, best.clamp_min(0).long())[many]  # of near ties either comes first
    torch.testing.assert_close(chosen, top.values[many], atol=1e-6, rtol=1e-4)
    assert (best[many].sort(-1).values.diff() > 0).all()


def seen_layer(tokens: int) -> LayerView:
    """The second layer of a tiny model on a prompt of so many tokens."""
    layers: list[LayerView] = []
    ids = torch.arange(tokens)[None] % 89 + 5
    prefill(tiny_model("qwen2"), ids, layers.append)
    return layers[1]


def test_persistence_curves_are_those_of_the_whole_matrix() -> None:
    tokens, shifts = 83, [1, 3, 19]
    view = seen_layer(tokens)
    curves = persistence_curves(view, shifts)
    assert curves.shape == (len(CURVES), 6, 3)
    at = torch.arange(tokens)
    logits = view.attention.logits(view.queries, view.keys.repeat_interleave(2, 0).mT)
    full = logits.masked_fill(~view.attention.visible(at, at), -torch.inf).softmax(-1)
    rows = [round(r * (tokens - 19 - 1) / (ROWS - 1)) for r in range(ROWS)]
    for number, u in enumerate(shifts):
        for head in (0, 5):
            for curve, v in ((0, 0), (1, u)):
                kept = [
                    torch.minimum(full[head, t, : tokens - v], full[head, t + u, v:]).sum()
                    for t in rows
                ]
                mean = float(torch.stack(kept).mean())
                assert abs(float(curves[curve, head, number]) / 255 - mean) <= 0.51 / 255


def test_expected_curves_are_the_figures_of_the_analysis() -> None:
    """The query model expects the same of a shift, whoever asks."""
    view = seen_layer(64)
    heads = len(view.queries)
    rows = spread_rows(torch.full((heads,), 64 - 4), ROWS)
    sums = expected_persistence(view, rows, torch.full((heads,), 4)) / ROWS
    curves = persistence_curves(view, [1, 4]).double() / 255
    for curve, number, column in ((2, 0, 0), (3, 0, 1), (3, 1, 2), (2, 1, 3)):
        assert torch.allclose(curves[curve, :, number], sums[:, column].double(), atol=0.51 / 255)


def test_views_are_kept_in_a_file(views: Views, tmp_path: Path) -> None:
    assert len(views.tokens) == 170
    assert views.budgets == [40, 42, 85]
    assert views.kept.shape == (2, 3, 6, 170)  # methods, budgets, KV heads of two layers, tokens
    assert views.kept.sum((2, 3)).tolist() == [[6 * budget for budget in views.budgets]] * 2
    assert views.shifts == [1, 2, 4, 8, 16, 32]
    path = save_views(tmp_path / FILE, [views, replace(views, title=HOSTILE)])
    again = load_views(path)
    assert [x.title for x in again] == ["text", HOSTILE]
    for name, value in vars(views).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again[1], name), value)
        elif name != "title":
            assert getattr(again[1], name) == value


def test_views_that_are_broken_are_refused(views: Views, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"PK no zip")
    with pytest.raises(ReportError, match="cannot read the views"):
        load_views(path)
    np.savez(path, tokens=np.array([object()]))  # a pickle
    with pytest.raises(ReportError, match="an older schema"):
        load_views(path)
    np.savez(path, schema="tappa.views/2", count=1)
    with pytest.raises(ReportError, match="KeyError"):
        load_views(path)
    far = views.keys.copy()
    far[3, 5, 0] = 170  # of 170 tokens the last is 169
    for name, value in (
        ("keys", far),
        ("tokens", np.array(views.tokens[:-1])),
        ("maps", views.maps[:-1]),
        ("budgets", np.array([1])),
        ("persistence", views.persistence[:3]),
    ):
        with np.load(save_views(path, [views])) as file:
            arrays = dict(file)
        np.savez(path, **(arrays | {f"0.{name}": value}))
        with pytest.raises(ReportError, match="cannot read the views"):
            load_views(path)


def test_a_page_with_views_that_are_broken_opens(
    analysis: Path, views: Views, tmp_path: Path
) -> None:
    copy = tmp_path / "analysis.json"
    copy.write_text(analysis.read_text())
    (tmp_path / FILE).write_bytes(b"PK no zip")
    content = content_of([copy])
    assert content["texts"] == []
    notes = " ".join(content["notes"])
    assert f"cannot read the views {tmp_path.name}/views.npz: " in notes
    assert "run tappa analyze again" in notes
    assert str(tmp_path) not in notes
    fewer = replace(
        views,
        **{name: getattr(views, name)[:11] for name in ("maps", "keys", "weights")},
        persistence=views.persistence[:, :11],
    )
    save_views(tmp_path / FILE, [fewer])
    assert "has 11 heads, not shown" in " ".join(content_of([copy])["notes"])


def test_texts_that_do_not_fit_are_left_out(analysis: Path, views: Views, tmp_path: Path) -> None:
    paths = []
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "analysis.json")
        paths[-1].write_text(analysis.read_text())
        texts = [replace(views, title=f"{name} {number}") for number in (1, 2)]
        save_views(paths[-1].with_name(FILE), texts)
    content = content_of(paths)
    titles = [text["title"] for text in content["texts"]]
    assert titles == ["before 1", "after 1", "before 2", "after 2"]  # first ones first
    page = render(content)
    assert [text["analysis"] for text in unpacked(page)["texts"]] == [0, 1, 0, 1]
    assert unpacked(page, "text-3")["title"] == "after 2"
    fewer = render(content, limit=len(page))  # which some slack is kept below
    assert [text["title"] for text in unpacked(fewer)["texts"]] == titles[:3]
    assert "after 2 is left out: the page would become too large" in unpacked(fewer)["notes"]
    assert len(fewer) < len(page)
    least = unpacked(render(content, limit=9))
    assert [text["title"] for text in least["texts"]] == titles[:1]


def test_layers_are_matched_after_pruning() -> None:
    def analysis(layers: int) -> dict[str, Any]:
        return {"heads": [{"layer": layer, "head": 0} for layer in range(layers)]}

    pruned = {"pruning.json": [{"name": "p", "content": {"plan": {"layers": [3, 1]}}}]}
    found = origins([analysis(5), analysis(3), analysis(5), analysis(4)], pruned)
    assert found == [[0, 1, 2, 3, 4], [0, 2, 4], [0, 1, 2, 3, 4], None]
    assert origins([analysis(5), analysis(3)], {}) == [[0, 1, 2, 3, 4], None]
    broken = {"pruning.json": [{"name": "p", "content": {"plan": {"layers": "no"}}}]}
    assert origins([analysis(2), analysis(1)], broken) == [[0, 1], None]


def test_what_a_page_holds(analysis: Path) -> None:
    raw = json.loads(analysis.read_text())
    content = unpacked(render(content_of([analysis, analysis])))
    assert len(content["analyses"]) == 2
    first = content["analyses"][0]
    assert len(first["heads"]) == len(raw["heads"]) == len(first["attention"])
    for key in FIGURES:
        expected = raw["heads"][3][key]
        assert first["heads"][3][key] == pytest.approx(expected, rel=1e-3)
    sums = raw["statistics"][0]["sums"]
    expected = sums["lag_attention"][2][5] / sums["lag_counts"][5]
    assert first["attention"][2][5] == pytest.approx(expected, rel=1e-3)
    assert len(first["attention"][2]) == min(150, LAGS)
    assert sum(first["energy"][1]) == pytest.approx(1, abs=0.01)
    assert content["texts"] == []
    assert any("views.npz" in note for note in content["notes"])


def test_untrusted_text_is_data_only(analysis: Path, tmp_path: Path) -> None:
    raw = json.loads(analysis.read_text())
    raw["model"]["name"] = HOSTILE
    raw["heads"][0]["observed"] = HOSTILE
    path = tmp_path / f"{'x' * 9}.json"
    path.write_text(json.dumps(raw))
    text = look(tiny_model("qwen2"), tiny_tokenizer(), HOSTILE + TEXT, title=HOSTILE, tokens=90)
    save_views(tmp_path / FILE, [replace(text, methods=[HOSTILE] * len(text.methods))])
    (tmp_path / "results").mkdir()
    for name in RESULTS:
        (tmp_path / "results" / name).write_text(json.dumps({"method": HOSTILE}))
    page = render(content_of([path], tmp_path / "results"))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert unpacked(page)["analyses"][0]["title"] == HOSTILE
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = re.findall(r"'sha256-([^']+)'", page)
    packed = re.search(r'id="plotly">([^<]*)</script>', page)
    assert packed
    scripts.append(gzip.decompress(base64.b64decode(packed[1])).decode())
    assert "Plotly" in scripts[1]
    assert len(scripts) == len(hashes) == 2  # nothing else may run
    for script, wanted in zip(scripts, hashes, strict=True):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == wanted
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert not re.findall(r'(?:src|href)="(?!#)', page.split("<script>")[0])


def test_what_is_missing_is_said(analysis: Path, tmp_path: Path) -> None:
    raw = json.loads(analysis.read_text())
    raw["schema"] = "tappa.analysis/0"
    del raw["statistics"]
    for head in raw["heads"]:
        del head["entropy"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(raw))
    notes = " ".join(content_of([old])["notes"])
    for words in ("schema tappa.analysis/0", "lacks entropy", "no lag profiles"):
        assert words in notes
    raw["heads"] = [{"layer": "first", "head": 0}, *raw["heads"], None]
    old.write_text(json.dumps(raw))
    assert f"{old.name}: 2 heads without layer and number" in content_of([old])["notes"][0]
    raw["heads"][0] = raw["heads"][1] | {"layer": 1_000_000}  # of a model of two layers
    raw["heads"][-1] = raw["heads"][1] | {"head": 6}  # of six, from 0
    old.write_text(json.dumps(raw))
    content = content_of([old])
    assert "2 heads without layer and number, or beyond those" in content["notes"][0]
    assert (len(content["analyses"][0]["heads"]), content["damaged"]) == (12, 1)
    raw |= {"prompts": "none", "model": 3, "agreement": [], "heads": {}}
    raw["heads"] = []
    old.write_text(json.dumps(raw))
    assert "has no heads" in " ".join(unpacked(render(content_of([old])))["notes"])
    for text, words in (("[", "not JSON"), ("{}", "expected an Analysis"), ("[1]", "an Analysis")):
        old.write_text(text)
        with pytest.raises(ReportError, match=words):
            content_of([old])
    with pytest.raises(ReportError, match="cannot read"):
        content_of([tmp_path / "none.json"])
    with pytest.raises(ReportError, match=r"is a folder: try .*analysis.json"):
        content_of([tmp_path])
    for version in ("9", "2", "1x", "-1", ""):
        old.write_text(json.dumps({"schema": f"tappa.analysis/{version}", "heads": []}))
        with pytest.raises(ReportError, match=r"expected schema tappa.analysis/1 or an older"):
            content_of([old])
    with pytest.raises(ReportError, match="folder of results"):
        content_of([analysis], tmp_path / "nowhere")
    (tmp_path / "r").mkdir()
    assert "no results.json" in " ".join(content_of([analysis], tmp_path / "r")["notes"])
    for text in ("{", "[]", "{}"):
        for name in RESULTS:
            (tmp_path / "r" / name).write_text(text)
        content = content_of([analysis], tmp_path / "r")
        assert {f"r/{name} cannot be read" for name in RESULTS} < set(content["notes"])
        assert content["damaged"] == len(RESULTS)
    with pytest.raises(OutputError):
        write_report(tmp_path / "none" / "x.html", [analysis])


def test_commands(run: Run, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    options = ["analyze", model, "--text", text, "--tokens", 120, "--device", "cpu", "--out", out]
    code, stdout, _ = run(*options)
    assert (code, "report.html" in stdout) == (0, True)
    assert sorted(p.name for p in out.iterdir()) == [
        *("analysis.json", "asked.json", "heads.csv", "report.html", "views.npz")
    ]
    assert len(unpacked((out / "report.html").read_text(), "text-0")["tokens"]) == 120
    page = tmp_path / "again.html"
    code, stdout, errors = run("report", out / "analysis.json", "--out", page)
    assert (code, stdout.split(), errors) == (0, ["wrote", str(page)], "")
    results = leave(tmp_path / "results", {name: {} for name in RESULTS})
    code, _, errors = run("report", out / "analysis.json", "--results", results, "--out", page)
    said = "5 notes on what is missing: see the top of the page"  # four files, and none is left
    assert (code, errors.strip()) == (0, said)
    assert unpacked(page.read_text())["texts"] == [{"analysis": 0, "title": "text.txt"}]
    more = [*options, "--text", text, "--text", text, "--shown-texts", 2, "--no-report"]
    code, stdout, _ = run(*more, "--force")
    assert (code, "views.npz" in stdout) == (0, False)
    code, _, errors = run("report", text)
    assert (code, "not JSON" in errors) == (2, True)


def test_figures_for_print(analysis: Path, tmp_path: Path) -> None:
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "r" / "a" / "results.json").write_text(json.dumps({"tables": [TABLE]}))
    copy = tmp_path / "analysis.json"
    copy.write_text(analysis.read_text())
    views = look(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=150, methods=[])
    save_views(tmp_path / FILE, [views])
    content = content_of([copy], tmp_path / "r")
    assert any("no tokens that methods keep" in note for note in content["notes"])
    content["analyses"][0]["title"] = "$x^{$ <b>"  # a name is no formula
    found = figures(content, "svg")
    assert {Path(name).stem for name in found} == {
        *("atlas", "similarity", "channels", "patterns", "persistence"),
        *("quality-a", "memory-a"),  # no methods in these views, so no budgets
    }
    assert all(picture.startswith(b"<?xml") for picture in found.values())
    assert list(figures(content, only="quality")) == ["quality-a.png"]
    assert figures(content, only="qual") == {}
    without = content_of([analysis])
    assert set(figures(without)) == {"atlas.png", "similarity.png", "channels.png"}
    without["analyses"][0]["heads"] = []
    assert figures(without) == {}
    with pytest.raises(ReportError, match="png, svg, pdf, got 'bmp'"):
        figures(content, "bmp")


def test_budgets_and_verifications_for_print(analysis: Path, views: Views, tmp_path: Path) -> None:
    copy = tmp_path / "analysis.json"
    copy.write_text(analysis.read_text())
    save_views(tmp_path / FILE, [views])
    content = content_of([copy], leave(tmp_path / "r"))
    found = figures(content)
    assert "budgets.png" in found
    claims = {f"{name}-run.png" for name in VERIFIED}
    assert claims < set(found)
    assert figures(content, only="relocation").keys() == {"relocation-run.png"}
    del content["results"]["verification.json"][0]["content"]["bounds"]
    assert set(found) - set(figures(content)) == claims  # the others are drawn
    said = "run/verification.json: expected a verification of tappa, got KeyError"
    assert content["notes"][-1].endswith(said)


def test_every_figure_has_a_script(analysis: Path, views: Views, tmp_path: Path) -> None:
    copy = tmp_path / "analysis.json"
    copy.write_text(analysis.read_text())
    save_views(tmp_path / FILE, [views])
    found = figures(content_of([copy], leave(tmp_path / "r")))
    names = {name.split(".")[0].removesuffix("-run") for name in found}
    folder = Path(__file__).parents[2] / "runs" / "figures"
    assert names | {"figure"} == {path.stem for path in folder.glob("*.py")}
    command = [sys.executable, str(folder / "quality.py"), str(copy)]
    out = tmp_path / "out.svg"
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "r"), "-o", str(out)], capture_output=True, text=True
    )
    assert done.stdout == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"<?xml")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "no data for quality" in done.stderr) == (2, True)


def test_the_clearest_head_of_a_label_is_drawn(analysis: Path) -> None:
    heads = content_of([analysis])["analyses"][0]["heads"][:3]
    for head, value in zip(heads, (0.2, 0.9, 0.4), strict=True):
        head |= {"observed": "re-access", "vertical": value}
    assert clearest({"heads": heads}, ["re-access", "seasonal"]) == [1]


def test_figures_command(run: Run, analysis: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "verification.json").write_text("{}")
    options = ["--format", "pdf", "--results", tmp_path / "r"]
    code, out, errors = run("figures", analysis, "-o", tmp_path / "f", *options)
    assert (code, "note: r/verification.json cannot be read" in errors) == (0, True)
    names = ["atlas.pdf", "channels.pdf", "similarity.pdf"]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == names
    assert out.count("wrote") == 3


def columns_drawn(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], **more: str) -> Any:
    """What the atlas shows, as matplotlib got it: the cells, and the words of the legend."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    shown: dict[str, Any] = {"words": []}
    imshow, legend = Axes.imshow, Figure.legend
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda self, x, *a, **k: (shown.update(cells=x), imshow(self, x, *a, **k))[1],
    )
    monkeypatch.setattr(
        Figure,
        "legend",
        lambda self, h, w, **k: (shown.update(words=w), legend(self, h, w, **k))[1],
    )
    assert list(figures(content, only="atlas", **more)) == ["atlas.png"]
    return shown


@pytest.mark.parametrize("column", ["", "entropy", "observed", "explained_scores_re-access"])
def test_the_atlas_has_the_colours_of_any_column(
    analysis: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    content = content_of([analysis], columns=[column] if column else [])
    frame = tappa.Analysis.load(analysis).to_frame().sort_values(["layer", "head"])
    values = frame[column or "sink_mass"]
    if column == "observed":
        values = values.map(LABELS.index)
    shown = columns_drawn(monkeypatch, content, colour=column)
    np.testing.assert_allclose(shown["cells"], values.to_numpy(float).reshape(2, 6), rtol=1e-3)
    assert shown["words"] == (list(LABELS) if column == "observed" else [])


def test_the_atlas_of_a_file_without_its_column(analysis: Path, tmp_path: Path) -> None:
    raw = json.loads(analysis.read_text())
    for head in raw["heads"]:
        del head["sink_mass"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(raw))
    content = content_of([old])
    assert content["analyses"][0]["colour"] == "observed"
    assert content_of([analysis])["analyses"][0]["colour"] == "sink_mass"
    with pytest.raises(ReportError, match=r"values in sink_mass, .*old.json has none of any head"):
        figures(content, only="atlas", colour="sink_mass")
    with pytest.raises(ReportError, match="got 'zzz'; examples: sink_mass, q_similarity"):
        figures(content, colour="zzz")
    with pytest.raises(ReportError, match="got 'entropi'; did you mean 'entropy'"):
        content_of([old], columns=["entropi"])


HEADS = [{"layer": layer, "head": head} for layer in range(3) for head in range(7)]


@pytest.mark.parametrize(
    ("names", "places"),
    [("L2H5", [19]), ("2 5", [19]), ("l1 h0, L0H6,L1H0", [7, 6]), ("1.3", [10]), ("L2 H5,", [19])],
)
def test_heads_are_chosen_by_their_names(names: str, places: list[int]) -> None:
    assert chosen_heads(names, HEADS) == places


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("L2H7", "got 'L2H7'; did you mean 'L2H"),
        ("X", "got 'X'; heads go from L0H0 to L2H6"),
        ("L1H0,first", "got 'first'; heads go from"),
        ("25", "got '25'; did you mean 'L2H5'"),
        (",", "expected 1 to 12 heads, such as L0H1, got 0"),
        (",".join(f"L{i // 7}H{i % 7}" for i in range(13)), "got 13"),
    ],
)
def test_heads_that_are_none_are_refused(names: str, said: str) -> None:
    with pytest.raises(ReportError, match=said):
        chosen_heads(names, HEADS)


def test_chosen_heads_are_drawn(analysis: Path, views: Views, tmp_path: Path, run: Run) -> None:
    copy = tmp_path / "analysis.json"
    copy.write_text(analysis.read_text())
    save_views(tmp_path / FILE, [views])
    options = ["--format", "svg", "--head", "L1H4,L0H2", "--colour", "entropy"]
    code, out, _ = run("figures", copy, "-o", tmp_path / "f", *options)
    assert (code, out.count("wrote")) == (0, 6)
    for name in ("patterns", "persistence"):
        comments = re.findall(r"<!-- (L\d H\d)", (tmp_path / "f" / f"{name}.svg").read_text())
        assert comments == ["L1 H4", "L0 H2"]
    for wrong in (["--colour", "entropi"], ["--head", "L1H9"]):
        code, out, errors = run("figures", copy, "-o", tmp_path / "g", *wrong)
        assert (code, out, errors.count("\n")) == (2, "", 1)
        assert "did you mean" in errors
    assert not (tmp_path / "g").exists()
