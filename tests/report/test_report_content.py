"""What a report holds: pictures against naive ones, untrusted text, files that lack things."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tappa
from tappa.attention_profile import Attention
from tappa.errors import OutputError, ReportError
from tappa.report.content import FIGURES, LAGS, content_of
from tappa.report.page import render, write_report
from tappa.report.prints import clearest, figures
from tappa.report.views import STRETCH, TOP, Views, look, picture
from tiny import save_tiny, tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9
Run = Callable[..., tuple[int, str, str]]
HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tappa.analyze(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=150)
    return found.save(tmp_path_factory.mktemp("report") / "analysis.json")


def unpacked(page: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)</script>', page)
    assert packed
    return dict(json.loads(gzip.decompress(base64.b64decode(packed[1]))))


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
    expected = 255 * torch.log1p(STRETCH * share) / np.log1p(STRETCH)
    assert float((maps.float() - expected).abs().max()) <= 0.51
    top = full.topk(TOP, -1)
    assert torch.equal(weights.float(), (top.values * 255).round())
    many = top.values[..., -1] > 0
    assert torch.equal(best[many], top.indices.int()[many])


def test_views_are_kept_in_a_file(tmp_path: Path) -> None:
    views = look(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=170, methods=["snapkv"])
    assert len(views.tokens) == 170
    assert views.kept.shape[1:] == (6, 170)  # two layers of three KV heads
    assert views.kept.sum((1, 2)).tolist() == [6 * views.budget]
    again = Views.load(views.save(tmp_path / "views.npz"))
    assert again.tokens == views.tokens
    for name in ("maps", "keys", "weights", "kept"):
        np.testing.assert_array_equal(getattr(again, name), getattr(views, name))
    (tmp_path / "views.npz").write_bytes(b"PK no zip")
    with pytest.raises(ReportError, match="cannot read the views"):
        Views.load(tmp_path / "views.npz")
    np.savez(tmp_path / "pickled.npz", tokens=np.array([object()]))
    with pytest.raises(ReportError):
        Views.load(tmp_path / "pickled.npz")


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
    assert content["views"] is None
    assert any("views.npz" in note for note in content["notes"])


def test_untrusted_text_is_data_only(analysis: Path, tmp_path: Path) -> None:
    raw = json.loads(analysis.read_text())
    raw["model"]["name"] = HOSTILE
    raw["heads"][0]["observed"] = HOSTILE
    path = tmp_path / f"{'x' * 9}.json"
    path.write_text(json.dumps(raw))
    page = render(content_of([path]))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert unpacked(page)["analyses"][0]["title"] == HOSTILE
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = re.findall(r"'sha256-([^']+)'", page)
    assert len(scripts) == len(hashes) == 2
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
    raw["heads"] = []
    old.write_text(json.dumps(raw))
    assert "has no heads" in " ".join(unpacked(render(content_of([old])))["notes"])
    for text, words in (("[", "not JSON"), ("{}", "expected an Analysis"), ("[1]", "an Analysis")):
        old.write_text(text)
        with pytest.raises(ReportError, match=words):
            content_of([old])
    with pytest.raises(ReportError, match="cannot read"):
        content_of([tmp_path / "none.json"])
    with pytest.raises(ReportError, match="folder of results"):
        content_of([analysis], tmp_path / "nowhere")
    (tmp_path / "r").mkdir()
    assert "no results.json" in " ".join(content_of([analysis], tmp_path / "r")["notes"])
    (tmp_path / "r" / "results.json").write_text("{")
    assert "r/results.json cannot be read" in content_of([analysis], tmp_path / "r")["notes"]
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
        *("analysis.json", "heads.csv", "report.html", "views.npz")
    ]
    assert len(unpacked((out / "report.html").read_text())["views"]["tokens"]) == 120
    page = tmp_path / "again.html"
    code, stdout, _ = run("report", out / "analysis.json", "--out", page)
    assert (code, stdout.split()) == (0, ["wrote", str(page)])
    assert unpacked(page.read_text())["views"]["tokens"]
    code, _, errors = run("report", text)
    assert (code, "not JSON" in errors) == (2, True)


TABLE = {
    "name": "ruler: average",
    "metric": "score",
    "lower_is_better": False,
    "rows": [
        {"method": "full", "budget": None, "n": 5, "mean": 0.9, "error": 0.1},
        {"method": "tappa", "budget": 128.0, "n": 5, "mean": 0.5, "error": None},
        {"method": "tappa", "budget": 64.0, "n": 5, "mean": 0.4, "error": 0.1},
    ],
}


def test_figures_for_print(analysis: Path, tmp_path: Path) -> None:
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "r" / "a" / "results.json").write_text(json.dumps({"tables": [TABLE]}))
    views = look(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=150, methods=[])
    content = content_of([analysis], tmp_path / "r", views)
    assert any("no tokens that methods keep" in note for note in content["notes"])
    content["analyses"][0]["title"] = "$x^{$ <b>"  # a name is no formula
    found = figures(content, "svg")
    assert set(found) == {
        *("atlas.svg", "similarity.svg", "channels.svg", "patterns.svg", "quality-a.svg")
    }
    assert all(picture.startswith(b"<?xml") for picture in found.values())
    without = content_of([analysis])
    assert set(figures(without)) == {"atlas.png", "similarity.png", "channels.png"}
    without["analyses"][0]["heads"] = []
    assert figures(without) == {}
    with pytest.raises(ReportError, match="png, svg, pdf, got 'bmp'"):
        figures(content, "bmp")


def test_the_clearest_head_of_a_label_is_drawn(analysis: Path) -> None:
    heads = content_of([analysis])["analyses"][0]["heads"][:3]
    for head, value in zip(heads, (0.2, 0.9, 0.4), strict=True):
        head |= {"observed": "re-access", "vertical": value}
    assert clearest({"heads": heads}, ["re-access", "seasonal"]) == [1]


def test_figures_command(run: Run, analysis: Path, tmp_path: Path) -> None:
    code, out, _ = run("figures", analysis, "-o", tmp_path / "f", "--format", "pdf")
    assert code == 0
    names = ["atlas.pdf", "channels.pdf", "similarity.pdf"]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == names
    assert out.count("wrote") == 3
