"""Checks of the numbers that make up a method."""

import math

from torch import Tensor

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


def check_ids(input_ids: Tensor) -> None:
    """Raise CompressionError unless these are token ids of some rows, of equal length."""
    if not isinstance(input_ids, Tensor):
        kind = type(input_ids).__name__
        raise CompressionError(f"expected token ids as a tensor (rows, tokens), got a {kind}")
    whole = not (input_ids.is_floating_point() or input_ids.is_complex())
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not whole:
        raise CompressionError(
            f"expected token ids of shape (rows, tokens), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}"
        )
