"""What a reader chooses of a report: a column to colour heads by, heads to draw."""

import re
from collections.abc import Sequence
from typing import Any

from tappa.columns import COLUMNS
from tappa.errors import ReportError
from tappa.wording import did_you_mean

ATLAS = "sink_mass"  # of all shares of attention the one whose quartiles are furthest apart
MOST_HEADS = 12  # side by side in a figure
PLACE = re.compile(r"L?(\d+)[\s.:]*(?:H|\s|\.|:)\s*(\d+)", re.IGNORECASE)


def known_column(name: str) -> str:
    """A column of heads.csv. Raises ReportError for a name that is none."""
    if name in COLUMNS:
        return name
    ending = did_you_mean(name, COLUMNS) or "; examples: sink_mass, q_similarity, observed"
    raise ReportError(f"expected a column of heads.csv, got {name!r}{ending}")


def atlas_colour(heads: Sequence[dict[str, Any]]) -> str:
    """What colours the atlas at first: ATLAS, or the label in a file without it."""
    return ATLAS if any(head.get(ATLAS) is not None for head in heads) else "observed"


def chosen_heads(names: str, heads: Sequence[dict[str, Any]]) -> list[int]:
    """`L18H8, L2 H1` -> their places among the heads, in this order and each once.

    Raises ReportError for what is no head, heads that are not there, and too many.
    """
    places = {(head["layer"], head["head"]): place for place, head in enumerate(heads)}
    found = dict.fromkeys(_place(name.strip(), places) for name in names.split(",") if name.strip())
    if not 1 <= len(found) <= MOST_HEADS:
        raise ReportError(f"expected 1 to {MOST_HEADS} heads, such as L0H1, got {len(found)}")
    return list(found)


def _place(name: str, places: dict[tuple[int, int], int]) -> int:
    match = PLACE.fullmatch(name)
    wanted = (int(match[1]), int(match[2])) if match else None
    if wanted in places:
        return places[wanted]
    known = [f"L{layer}H{head}" for layer, head in places]
    typed = f"L{wanted[0]}H{wanted[1]}" if wanted else name.upper()
    ending = did_you_mean(typed, known) or f"; heads go from {known[0]} to {known[-1]}"
    raise ReportError(f"expected a head of the model, got {name!r}{ending}")
