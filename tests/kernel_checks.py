"""How close the sums of a kernel must be to those of its reference."""

from typing import Any

import torch
from torch import Tensor


def check_sums(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative RMS of every sum at most 1e-3; NaN never passes."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        got, value = actual[name].double(), value.double()
        assert got.shape == value.shape, name
        error = (got - value).norm() / value.norm().clamp_min(1e-9)
        assert error <= 1e-3, f"{name}: relative RMS {float(error):.1e}"


def poisoned(*shape: Any, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
    """In place of torch.empty: numbers that spoil whatever reads them."""
    sizes = shape[0] if shape and not isinstance(shape[0], int) else shape
    number = torch.nan if dtype is None or dtype.is_floating_point else 99
    return torch.full(sizes, number, dtype=dtype, **how)
