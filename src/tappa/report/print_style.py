"""What all printed figures share: colours, marks, titles."""

from typing import Any

from tappa.report.looking import METHODS

# Okabe and Ito's colours, told apart by all eyes
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#999999", "#D55E00", "#56B4E9", "#000000")
MARKS = "osD^X*Pv"
Content = dict[str, Any]


def title(axes: Any, text: str) -> None:
    """A name may hold a dollar sign: it is no formula."""
    axes.set_title(text, fontsize=9, parse_math=False)


def line_of(method: str, place: int) -> dict[str, Any]:
    """How a method is drawn, the same in every figure: those of the report have their own place."""
    known = [*METHODS, "tappa_paper"]
    number = known.index(method) if method in known else len(known) + place
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": "-" if number < len(COLOURS) else ":",
        "linewidth": 2.5 if method == "tappa" else 1,
        "markersize": 4,
        "label": method,
    }
