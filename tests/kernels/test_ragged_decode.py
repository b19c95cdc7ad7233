"""Attention over ragged buffers: the kernel against the formula, and both against plain softmax."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tappa.kernels.ragged_decode import ragged_decode_reference, ragged_decode_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [
    [0, 1, 63, 64, 65, 131],  # empty, around the size of a block, in several parts
    [7],
    [3, 300],
]


def case(lengths: list[int], dtype: torch.dtype, group: int = 3, dim: int = 10) -> dict[str, Any]:
    """Segments with gaps of NaN between them, which nothing may read."""
    generator = torch.Generator().manual_seed(0)
    gaps = [5 + 2 * n for n in range(len(lengths))]
    starts = [sum(gaps[: n + 1]) + sum(lengths[:n]) + n for n in range(len(lengths))]
    slots = starts[-1] + lengths[-1] + 4
    keys = torch.full((slots, dim), torch.nan)
    values = torch.full((slots, dim + 7), torch.nan)
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = torch.randn(length, dim, generator=generator)
        values[start : start + length] = torch.randn(length, dim + 7, generator=generator)
    new = len(lengths)
    made = {
        "queries": 2 * torch.randn(new, group, dim, generator=generator),
        "new_keys": torch.randn(new, dim, generator=generator),
        "new_values": torch.randn(new, dim + 7, generator=generator),
        "keys": keys,
        "values": values,
    }
    moved: dict[str, Any] = {name: x.to(DEVICE, dtype) for name, x in made.items()}
    moved["starts"] = torch.tensor(starts, device=DEVICE)
    moved["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return moved | {"longest": max(lengths), "scale": 0.3}


def plain(at: int, given: dict[str, Any], softcap: float | None) -> Tensor:
    """One segment by itself."""
    start, length = int(given["starts"][at]), int(given["lengths"][at])
    keys = torch.cat([given["keys"][start : start + length], given["new_keys"][at : at + 1]])
    values = torch.cat([given["values"][start : start + length], given["new_values"][at : at + 1]])
    logits = given["scale"] * given["queries"][at].double() @ keys.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.softmax(-1) @ values.double()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("attend", [ragged_decode_reference, ragged_decode_triton])
def test_every_segment_attends_to_its_own_tokens(
    attend: Any, lengths: list[int], softcap: float | None
) -> None:
    given = case(lengths, torch.float32)
    before = {name: given[name].clone() for name in ("keys", "values")}
    kept = torch.full_like(given["queries"], torch.nan)
    out = attend(**given, softcap=softcap, kept=kept)
    assert torch.equal(kept, given["queries"])
    for segment in range(len(lengths)):
        untouched = given | before
        expected = plain(segment, untouched, softcap).float()
        torch.testing.assert_close(out[segment], expected, atol=1e-5, rtol=1e-4)
    slots = (given["starts"] + given["lengths"]).tolist()
    for name, old in before.items():
        assert torch.equal(given[name][slots], given["new_" + name])
        old[slots] = given["new_" + name]
        torch.testing.assert_close(given[name], old, equal_nan=True, atol=0, rtol=0)


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
def test_half_precision_is_near_the_formula(dtype: torch.dtype) -> None:
    given = case([131, 67], dtype)
    expected = torch.stack([plain(segment, given, None) for segment in range(2)])
    out = ragged_decode_triton(**given)
    assert out.dtype == dtype
    error = (out.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


def test_queries_need_not_be_contiguous() -> None:
    given = case([31, 5], torch.float32)
    twin: dict[str, Any] = {
        name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()
    }
    given["queries"] = given["queries"].transpose(0, 1).contiguous().transpose(0, 1)
    given["new_keys"] = given["new_keys"].T.contiguous().T
    assert not given["queries"].is_contiguous()
    assert torch.equal(ragged_decode_triton(**given), ragged_decode_triton(**twin))
