"""Checks of the numbers that make up a method."""

import math

from tappa.errors import CompressionError


def check_range(
    name: str,
    value: int | float,
    low: int | float,
    high: int | float = math.inf,
    above: bool = False,
) -> None:
    """Raise CompressionError unless `low <= value <= high` (`low < value` if `above`)."""
    if (low < value if above else low <= value) and value <= high:
        return
    limit = f"above {low}" if above else f"of at least {low}"
    upper = "" if math.isinf(high) else f" and at most {high}"
    raise CompressionError(f"expected {name} {limit}{upper}, got {value!r}")
