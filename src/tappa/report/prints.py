"""Figures for papers, as PNG, SVG or PDF: the same data as the report page, drawn by matplotlib."""

import base64
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tappa.errors import MissingExtraError, ReportError

KINDS = ("png", "svg", "pdf")
# Okabe and Ito's colours, told apart by all eyes
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#999999", "#D55E00", "#56B4E9", "#000000")
MARKS = "osD^vP*X"
Content = dict[str, Any]


def figures(content: Content, kind: str = "png") -> dict[str, bytes]:
    """Every figure that the content (`tappa.report.content.content_of`) has data for, by file name.

    - atlas: the observed label of every head
    - similarity: q- and k-similarity by layer, means and ranges over heads
    - channels: how often each RoPE channel dominates, and how much energy it then holds
    - patterns: the clearest head of every label: attention map, mean attention by distance
    - quality-*: quality against budget with 95% intervals, one for each results.json

    Raises ReportError for another kind of picture, MissingExtraError without matplotlib.
    """
    if kind not in KINDS:
        raise ReportError(f"expected pictures as {', '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("figures need the extra, pip install 'tappa[figures]'")
    drawn: dict[str, tuple[Callable[[Any, Any], None], Any, tuple[float, float]]] = {}
    for analysis in content["analyses"][:1]:
        if analysis["heads"]:
            layers = max(head["layer"] for head in analysis["heads"]) + 1
            drawn["atlas"] = _atlas, (analysis, content["labels"]), (4.5, 0.19 * layers + 1.3)
            drawn["similarity"] = _similarity, analysis, (6.0, 3.2)
            drawn["channels"] = _channels, analysis, (6.0, 3.2)
        shown = clearest(analysis, content["labels"])
        if content["texts"] and analysis.get("attention") and shown:
            size = 2.3 * len(shown), 4.4
            drawn["patterns"] = _patterns, (analysis, content["texts"][0], shown), size
    for result in content["results"].get("results.json", []):
        tables = result["content"].get("tables") or []
        if tables:
            name = "quality-" + "-".join(Path(result["name"]).parts[-1:])
            drawn[name] = _quality, (result["name"], tables[-1]), (5.5, 3.8)
    return {
        f"{name}.{kind}": _draw(call, data, size, kind)
        for name, (call, data, size) in drawn.items()
    }


def _draw(
    call: Callable[[Any, Any], None], data: Any, size: tuple[float, float], kind: str
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "svg.hashsalt": "tappa", "pdf.fonttype": 42}):
        figure = Figure(figsize=size, layout="constrained")
        call(figure, data)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=300)
    return out.getvalue()


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=9, parse_math=False)


def _atlas(figure: Any, data: tuple[Content, list[str]]) -> None:
    from matplotlib.colors import ListedColormap

    analysis, labels = data
    heads = analysis["heads"]
    layers, columns = (max(head[key] for head in heads) + 1 for key in ("layer", "head"))
    grid = np.full((layers, columns), np.nan)
    for head in heads:
        if head["observed"] in labels:
            grid[head["layer"], head["head"]] = labels.index(head["observed"])
    axes = figure.subplots()
    axes.imshow(
        grid,
        ListedColormap(COLOURS[: len(labels)]),
        vmin=-0.5,
        vmax=len(labels) - 0.5,
        aspect="auto",
    )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for label, colour in zip(labels, COLOURS, strict=False):
        axes.plot([], [], "s", color=colour, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _title(axes, f"{analysis['title']}: observed patterns")


def _by_layer(heads: list[Content], key: str) -> list[np.ndarray]:
    layers = max(head["layer"] for head in heads) + 1
    values = [
        [h[key] for h in heads if h["layer"] == i and h[key] is not None] for i in range(layers)
    ]
    return [np.array(x, float) for x in values]


def _similarity(figure: Any, analysis: Content) -> None:
    axes = figure.subplots()
    for key, label, colour in (
        ("q_similarity", "q-similarity S", COLOURS[0]),
        ("k_similarity", "k-similarity", COLOURS[5]),
    ):
        values = _by_layer(analysis["heads"], key)
        at = [i for i, x in enumerate(values) if len(x)]
        axes.plot(at, [values[i].mean() for i in at], "o-", color=colour, markersize=3, label=label)
        low, high = ([f(values[i]) for i in at] for f in (np.min, np.max))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean cosine before RoPE")
    axes.legend()
    _title(axes, f"{analysis['title']}: mean and range over the heads of each layer")


def _channels(figure: Any, analysis: Content) -> None:
    heads = [h for h in analysis["heads"] if h["dominant_channel"] is not None]
    axes = figure.subplots()
    channels = [h["dominant_channel"] for h in heads]
    axes.hist(channels, bins=np.arange(-0.5, max(channels, default=0) + 1.5), color=COLOURS[0])
    axes.set_xlabel("dominant RoPE channel, fast to slow")
    axes.set_ylabel("heads")
    twin = axes.twinx()
    twin.plot(channels, [h["dominant_share"] for h in heads], ".", color=COLOURS[5], markersize=3)
    twin.set_ylabel("its share of energy (dots)", color=COLOURS[5])
    _title(axes, analysis["title"])


def clearest(analysis: Content, labels: list[str]) -> list[int]:
    """The head of every label that occurs with the strongest figure of its kind."""
    figure = {
        "re-access": "vertical",
        "sequential": "diagonal",
        "periodic": "period_strength",
        "seasonal": "seasonal",
        "unpredictable": "entropy",
    }
    found = []
    for label in labels:
        mine = [
            (h[figure[label]] or 0, i)
            for i, h in enumerate(analysis["heads"])
            if h["observed"] == label
        ]
        found += [max(mine)[1]] if mine else []
    return found


def _patterns(figure: Any, data: tuple[Content, Content, list[int]]) -> None:
    analysis, views, shown = data
    size = views["size"]
    maps = np.frombuffer(base64.b64decode(views["maps"]), np.uint8).reshape(-1, size, size)
    axes = figure.subplots(2, len(shown), squeeze=False, height_ratios=[1.3, 1])
    for column, index in enumerate(shown):
        head, (top, below) = analysis["heads"][index], axes[:, column]
        top.imshow(maps[index], "magma")
        top.set_xticks([])
        top.set_yticks([])
        place = f"L{head['layer']} H{head['head']}, S = {head['q_similarity'] or 0:.2f}"
        _title(top, f"{head['observed']}\n{place}")
        below.plot(analysis["logits"][index], color=COLOURS[0], linewidth=1)
        below.set_xlabel("tokens back")
    axes[0, 0].set_ylabel("attention (log)")
    axes[1, 0].set_ylabel("mean logit")


def _quality(figure: Any, data: tuple[str, Content]) -> None:
    name, table = data
    axes = figure.subplots()
    rows = [row for row in table["rows"] if row["budget"] is not None]
    budgets = sorted({row["budget"] for row in rows})
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted(
            (row["budget"], row["mean"], row["error"] or 0)
            for row in rows
            if row["method"] == method
        )
        x, y, error = np.array(mine, float).T
        axes.errorbar(
            *(x, y, 1.96 * error),
            fmt=f"{MARKS[place % len(MARKS)]}-",
            color=COLOURS[place % len(COLOURS)],
            linewidth=2.5 if method == "tappa" else 1,
            markersize=4,
            capsize=2,
            label=method,
        )
    full = next((row for row in table["rows"] if row["budget"] is None), None)
    if full is not None and not table["lower_is_better"]:
        axes.axhline(full["mean"], color="0.6", linestyle="--", label="full")
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{b:g}" for b in budgets])
    axes.minorticks_off()
    axes.set_xlabel("tokens kept per layer and KV head")
    axes.set_ylabel(table["metric"] + (" (less is better)" if table["lower_is_better"] else ""))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    _title(axes, f"{name}\n{table['name']}, n = {table['rows'][0]['n']}, 95% intervals")
