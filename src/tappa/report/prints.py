"""Figures for papers, as PNG, SVG or PDF: the same data as the report page, drawn by matplotlib."""

import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tappa.errors import MissingExtraError, ReportError, VerificationError
from tappa.report import print_atlas, print_heads, print_results
from tappa.report.choosing import chosen_heads, known_column
from tappa.report.print_style import Content

KINDS = ("png", "svg", "pdf")
VERIFIED = ("bounds", "relocation", "observations", "resonance", "sensitivity")


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn: how, of what, and how large, in inches."""

    name: str
    draw: Callable[[Any, Any], None]
    data: Any
    size: tuple[float, float]


def figures(
    content: Content, kind: str = "png", only: str = "", colour: str = "", heads: str = ""
) -> dict[str, bytes]:
    """Every figure that the content (`tappa.report.content.content_of`) has data for, by file name.

    - atlas: a column of heads.csv of every head
    - similarity: q- and k-similarity by layer, means and ranges over heads
    - channels: how often each RoPE channel dominates, and how much energy it then holds
    - patterns: chosen heads, or the clearest one of every label: attention map, mean logit by
      distance
    - persistence: of the same heads, after every shift, observed and expected
    - budgets: tokens that each method keeps by layer
    - quality-*, memory-*: quality with 95% intervals against budget and against bytes held, of each
      results.json
    - bounds-*, relocation-*, observations-*, resonance-*, sensitivity-*: of each verification.json

    A verification.json that is none is left out, with a note in `content["notes"]`. `only` draws
    those of one name: `atlas`, or `quality` for all of `quality-*`. `colour` is the column of the
    atlas (`content_of` must have kept it in `columns`), `heads` those to draw (`L18H8,L2H1`).
    Raises ReportError for another kind of picture, for what there is not, and for broken results,
    MissingExtraError without matplotlib.
    """
    if kind not in KINDS:
        raise ReportError(f"expected pictures as {', '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("figures need the extra, pip install 'tappa[figures]'")
    drawings = [*_of_heads(content, colour, heads), *_of_results(content)]
    found = {
        f"{drawing.name}.{kind}": _draw(drawing, kind)
        for drawing in drawings
        if _is_wanted(drawing.name, only)
    }
    verified = _of_verifications(content, kind) if not only or only in VERIFIED else iter(())
    return found | {name: x for name, x in verified if _is_wanted(Path(name).stem, only)}


def _is_wanted(name: str, only: str) -> bool:
    return not only or name == only or name.startswith(f"{only}-")


def _of_heads(content: Content, colour: str, heads: str) -> Iterator[Drawing]:
    for analysis in content["analyses"][:1]:
        if not analysis["heads"]:
            return
        labels = content["labels"]
        layers = max(head["layer"] for head in analysis["heads"]) + 1
        atlas = (4.5, 0.19 * layers + 1.3)
        column = _kept_column(analysis, colour or analysis["colour"])
        yield Drawing("atlas", print_atlas.atlas, (analysis, column, labels), atlas)
        yield Drawing("similarity", print_heads.similarity, analysis, (6.0, 3.2))
        yield Drawing("channels", print_heads.channels, analysis, (6.0, 3.2))
        shown = (
            chosen_heads(heads, analysis["heads"])
            if heads
            else print_heads.clearest(analysis, labels)
        )
        for text in [text for text in content["texts"] if text["analysis"] == 0][:1]:
            of_text = (analysis, text, shown)
            width = 2.3 * len(shown)
            if analysis.get("logits") and shown:
                yield Drawing("patterns", print_heads.patterns, of_text, (width, 4.4))
            if text["shifts"] and shown:
                yield Drawing("persistence", print_heads.persistence, of_text, (width, 3.2))
            if text["methods"] and text["kv_heads"] % layers == 0:
                yield Drawing("budgets", print_heads.budgets, (analysis, text), (6.5, 3.2))


def _kept_column(analysis: Content, column: str) -> str:
    """A column that some head has a value in. Raises ReportError."""
    if all(head.get(known_column(column)) is None for head in analysis["heads"]):
        raise ReportError(f"expected values in {column}, {analysis['file']} has none of any head")
    return column


def _of_results(content: Content) -> Iterator[Drawing]:
    for result in content["results"].get("results.json", []):
        tables = result["content"].get("tables") or []
        if tables:
            data, name = (result["name"], tables[-1]), Path(result["name"]).name
            yield Drawing(f"quality-{name}", print_results.quality, data, (5.5, 3.8))
            yield Drawing(f"memory-{name}", print_results.memory, data, (5.5, 3.8))


def _of_verifications(content: Content, kind: str) -> Iterator[tuple[str, bytes]]:
    """What `tappa verify --out` draws too."""
    for result in content["results"].get("verification.json", []):
        from tappa.verification.pictures import figures as pictures_of  # needs scipy
        from tappa.verification.results import Verified

        try:
            verified = Verified.of(result["content"])
        except VerificationError as error:  # the other files are drawn
            content["notes"].append(f"{result['name']}/verification.json: {error}")
            continue
        for name, picture in pictures_of(verified, kind).items():
            yield f"{Path(name).stem}-{Path(result['name']).name}.{kind}", picture


def _draw(drawing: Drawing, kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "svg.hashsalt": "tappa", "pdf.fonttype": 42}):
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure, drawing.data)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=300)
    return out.getvalue()
