"""Figures of evaluations for print: quality against budget and against memory."""

from typing import Any

import numpy as np

from tappa.report.print_style import Content, line_of, title


def quality(figure: Any, data: tuple[str, Content]) -> None:
    """Quality against budget, with 95% intervals."""
    _lines(figure, *data, "budget", "tokens kept per layer and KV head")


def memory(figure: Any, data: tuple[str, Content]) -> None:
    """Quality against the bytes that keys and values really held."""
    _lines(figure, *data, "nbytes", "MB of keys and values held")


def _lines(figure: Any, name: str, table: Content, key: str, words: str) -> None:
    axes = figure.subplots()
    unit = 1e6 if key == "nbytes" else 1
    rows = [row for row in table["rows"] if row["budget"] is not None]
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted(
            (row[key] / unit, row["mean"], row["error"] or 0)
            for row in rows
            if row["method"] == method
        )
        x, y, error = np.array(mine, float).T
        axes.errorbar(x, y, 1.96 * error, capsize=2, elinewidth=1, **line_of(method, place))
    full = next((row for row in table["rows"] if row["budget"] is None), None)
    if full is not None and not table["lower_is_better"]:
        axes.axhline(full["mean"], color="0.6", linestyle="--", label="full")
    axes.set_xscale("log")
    groups = [
        [r[key] / unit for r in rows if r["budget"] == b] for b in {r["budget"] for r in rows}
    ]
    ticks = sorted(float(np.median(group)) for group in groups)
    axes.set_xticks(ticks, [f"{tick:.{4 if key == 'budget' else 3}g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(words)
    axes.set_ylabel(table["metric"] + (" (less is better)" if table["lower_is_better"] else ""))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    title(axes, f"{name}\n{table['name']}, n = {table['rows'][0]['n']}, 95% intervals")
