"""What the last queries attend to: the kernel against the formulas, on segments amid NaN."""

from typing import Any

import pytest
import torch

from tappa.kernels.window_attention import Segments, window_sums_reference, window_sums_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def segments(lengths: list[int], dim: int, dtype: torch.dtype) -> Segments:
    """The last token of every segment stands at position 3 * its length."""
    generator = torch.Generator().manual_seed(0)
    starts = [7 * (n + 1) + sum(lengths[:n]) for n in range(len(lengths))]
    keys = torch.full((starts[-1] + lengths[-1] + 5, dim), torch.nan)
    positions = torch.full((len(keys),), 2**30, dtype=torch.int32)
    longest = max(lengths)
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = torch.randn(length, dim, generator=generator)
        positions[start : start + length] = torch.arange(longest - length, longest)
    begin = torch.tensor(starts, device=DEVICE)
    size = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Segments(keys.to(DEVICE, dtype), positions.to(DEVICE), begin, size, longest)


@pytest.mark.parametrize(
    ("lengths", "group", "window"), [([131, 61, 64], 3, 7), ([7], 1, 1), ([11, 1100], 2, 5)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_kernel_is_the_formula(
    lengths: list[int], group: int, window: int, softcap: float | None
) -> None:
    held = segments(lengths, 10, torch.float32)
    shape = len(lengths), group, window, 10
    queries = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    at = torch.arange(held.longest - window, held.longest, device=DEVICE)
    expected = window_sums_reference(held, queries, at, 0.7, softcap)
    actual = window_sums_triton(held, queries, at, 0.7, softcap)
    for name, wanted in expected._asdict().items():
        torch.testing.assert_close(getattr(actual, name), wanted, atol=1e-6, rtol=1e-4)
    assert float(expected.mean.sum()) == pytest.approx(len(lengths))


def test_by_hand() -> None:
    """Two queries at positions 1 and 2 on three equal keys: 1/2, 1/2, 0 and 1/3, 1/3, 1/3."""
    none: Any = torch.zeros(3, 2)
    at = torch.tensor([1, 2])
    held = Segments(
        none, torch.arange(3, dtype=torch.int32), torch.tensor([0]), torch.tensor([3]), 3
    )
    sums = window_sums_reference(held, torch.ones(1, 1, 2, 2), at, 1.0)
    assert sums.mean[0].tolist() == pytest.approx([5 / 12, 5 / 12, 1 / 6])
    assert sums.variance[0].tolist() == pytest.approx([1 / 72, 1 / 72, 1 / 18])
    entropy = 0.5 * torch.tensor(2.0).log() + torch.tensor(3.0).log() / 3  # of token 0 alone
    assert sums.entropy.tolist() == pytest.approx([float(entropy)])


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    held = segments([131, 64], 128, dtype)
    queries = torch.randn(2, 4, 32, 128, generator=torch.Generator().manual_seed(2))
    queries = queries.to(DEVICE, dtype)
    at = torch.arange(99, 131, device=DEVICE)
    expected = window_sums_reference(held, queries, at, 0.1)
    actual = window_sums_triton(held, queries, at, 0.1)
    for name, wanted in expected._asdict().items():
        error = (getattr(actual, name) - wanted).norm() / wanted.norm()
        assert error < 1e-3, name
