"""A verification for people: Markdown tables and figures."""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from tappa.verification.bounds import NAMES
from tappa.verification.results import Verified

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.6"  # told apart by all eyes


def to_markdown(found: Verified) -> str:
    """Every table, and the verdict."""
    model = found.model
    head = (
        f"{model['name']} ({model['class']}, {model['layers']} layers, {model['heads']} heads), "
        f"{found.tokens} tokens"
    )
    parts = [head, *_tables(found), *found.notes]
    parts.append("all that could be tested holds" if found.passed else "something FAILED")
    return "\n\n".join(parts) + "\n"


def _tables(found: Verified) -> Iterator[str]:
    if found.bounds:
        yield _table(
            "Bounds",
            ("claim", "pairs", "violations", "median bound / actual", "verdict"),
            [
                (NAMES[x.name], f"{x.checked:,}", x.violations, _number(x.tightness), x.verdict)
                for x in found.bounds
            ],
        )
    if found.relocations:
        yield _table(
            "Channels moved (Theorem 5.3): tokens between diagonals",
            ("head", "channel", "base", "predicted", "logits", "attention", "error", "verdict"),
            [
                (
                    f"L{x.layer} H{x.head}",
                    f"{x.source} to {x.target}",
                    "as it is" if x.base_factor == 1 else f"x {x.base_factor:g}",
                    _number(x.predicted),
                    _number(x.measured),
                    _number(x.attention),
                    "-" if x.error is None else f"{x.error:.3%}",
                    x.verdict + (f" ({x.reason})" if x.reason else ""),
                )
                for x in found.relocations
            ],
        )
    if found.constructed:
        patterns = dict.fromkeys(x.pattern for x in found.constructed)
        rows = []
        for pattern in patterns:
            mine = [x for x in found.constructed if x.pattern == pattern]
            right = sum(x.verdict == "pass" for x in mine)
            rows.append((pattern, f"{right} of {len(mine)}", max(x.noise for x in mine)))
        yield _table("Made-up heads", ("pattern", "both labels right", "noise up to"), rows)
    if found.observations:
        yield _table(
            "What the paper observed",
            ("claim", "S", "figure", "value", "95% interval", "heads"),
            [
                (x.claim, x.variant, x.figure, _number(x.value), _interval(x.low, x.high), x.n)
                for x in found.observations
            ],
        )
    if found.sensitivity:
        yield _table(
            "Who needs tokens: 1 - S against KL when cut to 64 tokens",
            ("grain", "S", "Spearman", "p", "n"),
            [(x.grain, x.variant, _number(x.value), _number(x.p), x.n) for x in found.sensitivity],
        )


def figures(found: Verified) -> dict[str, bytes]:
    """PNG pictures by file name; those of parts that were not asked for are missing."""
    pictures = {}
    measured = [x for x in found.relocations if x.measured is not None]
    if measured:
        pictures["relocation.png"] = _relocation(found)
    if found.bounds:
        pictures["bounds.png"] = _bounds(found)
    return pictures


def _relocation(found: Verified) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    measured = [x for x in found.relocations if x.measured is not None]
    most = max(x.predicted for x in measured) * 1.1
    axes.plot([0, most], [0, most], color=GREY, linewidth=1, label="theory")
    for name, marker, colour in (("attention", "x", ORANGE), ("measured", "o", BLUE)):
        points = [(x.predicted, getattr(x, name)) for x in measured]
        points = [(a, b) for a, b in points if b is not None]
        label = "mean logit" if name == "measured" else "mean attention"
        filled: dict[str, Any] = {"facecolors": "none"} if marker == "o" else {}
        axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=label, **filled)
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    axes.set_xlabel("predicted spacing of diagonals, 2π/θ (tokens)")
    axes.set_ylabel("measured spacing (tokens)")
    axes.set_title(f"{found.model['name']}: channels moved", fontsize=10, parse_math=False)
    axes.legend()
    return _png(figure)


def _bounds(found: Verified) -> bytes:
    from matplotlib.figure import Figure

    shown = [x for x in found.bounds if math.isfinite(x.tightness)]
    figure = Figure(figsize=(7, 0.45 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([NAMES[x.name] for x in shown], [x.tightness for x in shown], color=GREEN)
    axes.axvline(1, color=GREY)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("median of bound / actual (1: exact)")
    title = f"{found.model['name']}: {sum(x.violations for x in found.bounds)} violations"
    axes.set_title(title, fontsize=10, parse_math=False)
    return _png(figure)


def _png(figure: object) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)  # type: ignore[attr-defined]
    return out.getvalue()


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _number(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return "-"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_number(low)} to {_number(high)}"
