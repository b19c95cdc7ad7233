"""The atlas for print: layers x heads in the colours of a column of heads.csv."""

from typing import Any

import numpy as np

from tappa.columns import COLUMNS
from tappa.report.print_style import COLOURS, Content, title


def atlas(figure: Any, data: tuple[Content, str, list[str]]) -> None:
    """A column of words gets a colour for each of `labels`; one of numbers a scale."""
    analysis, column, labels = data
    found = [head[column] for head in analysis["heads"] if head[column] is not None]
    axes = figure.subplots()
    if any(isinstance(value, str) for value in found):
        _words(figure, axes, analysis["heads"], column, labels)
    else:
        image = axes.imshow(_grid(analysis["heads"], column), "cividis", aspect="auto")
        figure.colorbar(image, ax=axes, fraction=0.06)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    words = COLUMNS[column].words or column.replace("_", " ")
    named = {"observed": "observed patterns", "explained": "explained patterns"}
    title(axes, f"{analysis['title']}\n{named.get(column, words)}")


def _words(figure: Any, axes: Any, heads: list[Content], column: str, labels: list[str]) -> None:
    from matplotlib.colors import ListedColormap

    places = {label: place for place, label in enumerate(labels)}
    grid = _grid([head | {column: places.get(head[column])} for head in heads], column)
    scale = {"vmin": -0.5, "vmax": len(labels) - 0.5}
    axes.imshow(grid, ListedColormap(COLOURS[: len(labels)]), aspect="auto", **scale)
    for label, colour in zip(labels, COLOURS, strict=False):
        axes.plot([], [], "s", color=colour, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _grid(heads: list[Content], column: str) -> np.ndarray:
    """Layers x heads, NaN where a head has no number."""
    layers, columns = (max(head[key] for head in heads) + 1 for key in ("layer", "head"))
    grid = np.full((layers, columns), np.nan)
    for head in heads:
        if head[column] is not None:
            grid[head["layer"], head["head"]] = float(head[column])
    return grid
