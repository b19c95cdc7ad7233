"""The kernel for ragged keys against its reference, in Triton's interpreter."""

import math

import pytest
import torch

from tappa.compression import ragged_attention as module
from tappa.compression.ragged_attention import (
    can_attend,
    ragged_attention,
    ragged_attention_reference,
)

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "dim", "value_dim", "lengths"),
    [
        (2, 3, 2, 10, 10, [5, 1, 64, 65, 131, 17]),
        (1, 1, 7, 64, 64, [200]),
        (3, 1, 1, 16, 24, [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(
    rows: int,
    kv_heads: int,
    group: int,
    dim: int,
    value_dim: int,
    lengths: list[int],
    dtype: torch.dtype,
) -> None:
    """Between the segments are NaN, which must not be read."""
    generator = torch.Generator().manual_seed(0)
    gap = 3
    size = sum(lengths) + gap * len(lengths)
    keys = torch.full((size, dim), math.nan)
    values = torch.full((size, value_dim), math.nan)
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        keys[at : at + length] = torch.randn(length, dim, generator=generator)
        values[at : at + length] = torch.randn(length, value_dim, generator=generator)
        at += length + gap
    queries = torch.randn(rows, kv_heads * group, dim, generator=generator)
    inputs = (queries.to(dtype), keys.to(dtype), values.to(dtype))
    where = (torch.tensor(starts), torch.tensor(lengths))
    found = ragged_attention(*inputs, *where, 0.3)
    expected = ragged_attention_reference(*inputs, *where, 0.3)
    error = (found - expected).double().norm() / expected.double().norm()
    assert found.dtype == dtype
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)


def test_one_token_is_its_value() -> None:
    values = torch.arange(4.0)[None]
    where = (torch.tensor([0]), torch.tensor([1]))
    out = ragged_attention(torch.randn(1, 2, 4), torch.randn(1, 4), values, *where, 1.0)
    assert out.tolist() == [[[0.0, 1.0, 2.0, 3.0]] * 2]


def test_a_kernel_that_does_not_compile_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    module._runs_on.cache_clear()
    assert module._runs_on(device)  # in the interpreter
    assert not can_attend(torch.zeros(1))  # it is not what runs on a CPU

    def broken(*_: object) -> None:
        raise RuntimeError("no C compiler\nand a page of text")

    monkeypatch.setattr(module, "ragged_attention", broken)
    module._runs_on.cache_clear()
    with pytest.warns(RuntimeWarning, match="padded instead: RuntimeError: no C compiler$"):
        assert not module._runs_on(device)
    assert not module._runs_on(device)  # pytest turns a second warning into an error
    module._runs_on.cache_clear()
