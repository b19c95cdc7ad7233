"""Checks of the numbers that make up a method."""

import math

from tappa.errors import CompressionError

COUNTS = {"window", "sinks", "kernel", "future"}


def check_range(
    name: str,
    value: int | float,
    low: int | float,
    high: int | float = math.inf,
    above: bool = False,
) -> None:
    """Raise CompressionError unless `low <= value <= high` (`low < value` if `above`).

    Numbers of `COUNTS` have to be whole.
    """
    kinds = (int,) if name in COUNTS else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CompressionError(f"expected {name} as {kinds[-1].__name__}, got {value!r}")
    if (low < value if above else low <= value) and value <= high:
        return
    limit = f"above {low}" if above else f"of at least {low}"
    upper = "" if math.isinf(high) else f" and at most {high}"
    raise CompressionError(f"expected {name} {limit}{upper}, got {value!r}")
