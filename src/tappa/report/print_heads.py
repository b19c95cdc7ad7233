"""Figures of heads for print: similarity, channels, patterns, persistence, what is kept."""

import base64
from typing import Any

import numpy as np

from tappa.report.print_style import COLOURS, Content, line_of, title


def _by_layer(heads: list[Content], key: str) -> list[np.ndarray]:
    layers = max(head["layer"] for head in heads) + 1
    values = [
        [h[key] for h in heads if h["layer"] == i and h[key] is not None] for i in range(layers)
    ]
    return [np.array(x, float) for x in values]


def similarity(figure: Any, analysis: Content) -> None:
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
    title(axes, f"{analysis['title']}: mean and range over the heads of each layer")


def channels(figure: Any, analysis: Content) -> None:
    heads = [h for h in analysis["heads"] if h["dominant_channel"] is not None]
    axes = figure.subplots()
    channels = [h["dominant_channel"] for h in heads]
    axes.hist(channels, bins=np.arange(-0.5, max(channels, default=0) + 1.5), color=COLOURS[0])
    axes.set_xlabel("dominant RoPE channel, fast to slow")
    axes.set_ylabel("heads")
    twin = axes.twinx()
    twin.plot(channels, [h["dominant_share"] for h in heads], ".", color=COLOURS[5], markersize=3)
    twin.set_ylabel("its share of energy (dots)", color=COLOURS[5])
    title(axes, analysis["title"])


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


def patterns(figure: Any, data: tuple[Content, Content, list[int]]) -> None:
    analysis, text, shown = data
    maps = array_of(text, "maps", (-1, text["size"], text["size"]))
    axes = figure.subplots(2, len(shown), squeeze=False, height_ratios=[1.3, 1])
    for column, index in enumerate(shown):
        head, (top, below) = analysis["heads"][index], axes[:, column]
        top.imshow(maps[index], "magma")
        top.set_xticks([])
        top.set_yticks([])
        place = f"L{head['layer']} H{head['head']}, S = {head['q_similarity'] or 0:.2f}"
        title(top, f"{head['observed']}\n{place}")
        below.plot(analysis["logits"][index], color=COLOURS[0], linewidth=1)
        below.set_xlabel("tokens back")
    axes[0, 0].set_ylabel("attention (log)")
    axes[1, 0].set_ylabel("mean logit")


def persistence(figure: Any, data: tuple[Content, Content, list[int]]) -> None:
    """How much attention persists after a shift, and what the query model expects."""
    analysis, text, shown = data
    shifts = text["shifts"]
    curves = array_of(text, "persistence", (4, -1, len(shifts))) / 255
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, index in zip(panels, shown, strict=True):
        head = analysis["heads"][index]
        for curve, (label, colour, mark) in enumerate(
            (("same tokens (u, 0)", COLOURS[0], "o"), ("moving along (u, u)", COLOURS[5], "s"))
        ):
            axes.plot(shifts, curves[curve, index], f"{mark}-", color=colour, label=label)
            expected = {"color": colour, "fillstyle": "none", "label": f"{label}, expected"}
            axes.plot(shifts, curves[curve + 2, index], f"{mark}--", **expected)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shifts[::2], [str(shift) for shift in shifts[::2]])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("shift u (tokens)")
        title(axes, f"{head['observed']}\nL{head['layer']} H{head['head']}")
    panels[0].set_ylabel("persistence")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def budgets(figure: Any, data: tuple[Content, Content]) -> None:
    """Tokens that each method keeps in every layer, at the middle budget."""
    analysis, text = data
    at = len(text["budgets"]) // 2
    shape = (len(text["methods"]), len(text["budgets"]), text["kv_heads"], -1)
    kept = np.unpackbits(array_of(text, "kept", shape), axis=-1)[:, at].sum(-1)
    layers = max(head["layer"] for head in analysis["heads"]) + 1
    axes = figure.subplots()
    for place, (method, heads) in enumerate(zip(text["methods"], kept, strict=True)):
        axes.plot(heads.reshape(layers, -1).mean(1), **line_of(method, place))
    axes.set_ylim(0)
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens kept per KV head")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    title(axes, f"{analysis['title']}: {text['budgets'][at]} of {len(text['tokens'])} tokens")


def array_of(text: Content, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a text, in a shape."""
    return np.frombuffer(base64.b64decode(text[name]), np.uint8).reshape(shape)
