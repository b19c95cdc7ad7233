"""A verification as figures: one for each claim that has something to draw."""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tappa.verification.bounds import NAMES
from tappa.verification.results import Verified

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.6"  # told apart by all eyes
CURVES = 3  # heads whose resonance is drawn
LABELLED = 2  # layers that are named in a scatter plot


def figures(found: Verified, kind: str = "png") -> dict[str, bytes]:
    """Pictures by file name; those of parts that were not asked for are missing."""
    drawn: dict[str, tuple[bool, Callable[[Verified, Any], None], tuple[float, float]]] = {
        "bounds": (bool(found.bounds), _bounds, (7.0, 0.45 * len(found.bounds) + 1.2)),
        "relocation": (_measured(found) != [], _relocation, (5.5, 5.0)),
        "observations": (
            any(x.value is not None for x in found.observations),
            _observations,
            (10.0, 0.24 * len(found.observations) + 1.4),
        ),
        "resonance": (bool(found.resonances), _resonance, (8.0, 2.2 * CURVES + 0.8)),
        "sensitivity": (bool(found.needs), _sensitivity, (5.5, 4.5)),
    }
    return {
        f"{name}.{kind}": _draw(found, draw, size, kind)
        for name, (there, draw, size) in drawn.items()
        if there
    }


def _draw(
    found: Verified, draw: Callable[[Verified, Any], None], size: tuple[float, float], kind: str
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(found, figure)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=150)
    return out.getvalue()


def _title(axes: "Axes", found: Verified, text: str) -> None:
    axes.set_title(f"{found.model['name']}: {text}", fontsize=10, parse_math=False)


def _measured(found: Verified) -> list[Any]:
    return [x for x in found.relocations if x.measured is not None]


def _relocation(found: Verified, figure: Any) -> None:
    axes = figure.subplots()
    measured = _measured(found)
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
    _title(axes, found, "channels moved")
    axes.legend()


def _bounds(found: Verified, figure: Any) -> None:
    shown = [x for x in found.bounds if math.isfinite(x.tightness)]
    axes = figure.subplots()
    axes.barh([NAMES[x.name] for x in shown], [x.tightness for x in shown], color=GREEN)
    axes.axvline(1, color=GREY)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("median of bound / actual (1: exact)")
    _title(axes, found, f"{sum(x.violations for x in found.bounds)} violations")


def _observations(found: Verified, figure: Any) -> None:
    """Every figure with its interval; AUROC is at chance at .5, correlations are at 0."""
    shown = [x for x in found.observations if x.value is not None]
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    kinds = (("AUROC", "s", ORANGE), ("Spearman", "o", BLUE), ("", "D", GREEN))
    for place, x in enumerate(shown):
        kind, marker, colour = next(k for k in kinds if x.figure.startswith(k[0]))
        if x.low is not None and x.high is not None:
            axes.plot([x.low, x.high], [place, place], color=colour, linewidth=1)
        axes.plot(x.value, place, marker, color=colour, markersize=4)
    for kind, marker, colour in kinds:
        axes.plot([], [], marker, color=colour, label=kind or "share or cosine")
    names = [f"{x.claim}{f' ({x.variant})' if x.variant else ''}" for x in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7, parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("value and bootstrap 95% interval; chance: AUROC 0.5, Spearman 0")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _title(axes, found, "what the paper observed")


def _resonance(found: Verified, figure: Any) -> None:
    """One head at each target: what changes after L tokens, and what its moved channel says.

    The mean of `|a cos(x + L theta) - a cos(x)|` over all angles x is `a chord(L theta) 2 / pi`.
    """
    first = {x.target: x for x in reversed(found.resonances)}
    shown = [first[target] for target in sorted(first)][:CURVES]
    for axes, x in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        axes.plot(x.lags, x.change, "o-", color=BLUE, label="measured: mean |a[t, i+L] - a[t, i]|")
        expected = [2 / math.pi * e for e in x.expected]
        axes.plot(x.lags, expected, "x--", color=ORANGE, label="theory: e chord(Lθ) 2/π")
        _title(axes, found, f"L{x.layer} H{x.head}, dominant channel moved to {x.target}")
        axes.set_ylim(0)
        axes.set_ylabel("share of energy")
    axes.set_xlabel("L, multiples of the prompt's period (tokens)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _sensitivity(found: Verified, figure: Any) -> None:
    axes = figure.subplots()
    axes.scatter([x.dissimilarity for x in found.needs], [x.kl for x in found.needs], color=BLUE)
    for x in sorted(found.needs, key=lambda x: -x.kl)[:LABELLED]:
        axes.annotate(f" layer {x.layer}", (x.dissimilarity, x.kl), fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("1 - S of the layer (before RoPE, all pairs of the prompt)")
    axes.set_ylabel("KL when it alone keeps 64 tokens (nats)")
    _title(axes, found, "who needs tokens")
