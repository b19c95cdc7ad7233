"""The kernels of the attention profile under Triton's interpreter, through the public function."""

import pytest
import torch
from torch import Tensor

from kernel_checks import check_sums
from tappa import kernels
from tappa.attention_profile import (
    ADDITIVE,
    Attention,
    AttentionProfile,
    attention_profile,
    attention_profile_reference,
)
from tappa.kernels.profile import Chunk, Tiles, Tiling, profile_sums

SUMS = {*ADDITIVE, "column_mass"} - {"rows", "sink_rows", "pairs", "lag_counts"}
SMALL = Tiling(Tiles(16, 32), Tiles(32, 16, parts=4), Tiles(16, 32))  # many programs and seams


def vectors(tokens: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries of 4 heads and keys of 2, laid out as models leave them: tokens first."""
    generator = torch.Generator().manual_seed(tokens)
    made = [torch.randn(tokens, heads, dim, generator=generator) for heads in (4, 2)]
    return (2 * made[0].transpose(0, 1)).to(dtype), (made[1].transpose(0, 1) + 0.3).to(dtype)


def check(actual: AttentionProfile, expected: AttentionProfile) -> None:
    check_sums(*({name: getattr(p, name) for name in SUMS} for p in (actual, expected)))
    assert torch.equal(actual.lag_counts, expected.lag_counts)
    assert (actual.rows, actual.sink_rows, actual.pairs) == (
        *(expected.rows, expected.sink_rows, expected.pairs),
    )


@pytest.mark.parametrize(
    "attention",
    [
        Attention(0.25),
        Attention(0.3, softcap=3.0),
        Attention(0.3, window=1),
        Attention(0.3, window=29, softcap=5.0),
        Attention(0.25, window=500),
    ],
    ids=str,
)
@pytest.mark.usefixtures("on_kernels")
def test_against_the_reference(attention: Attention) -> None:
    queries, keys = vectors(137)
    expected = attention_profile_reference(queries, keys, attention, lags=41)
    check(attention_profile(queries, keys, attention, lags=41), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (3, 24), (53, 80)])
@pytest.mark.usefixtures("on_kernels")
def test_types_and_odd_sizes(tokens: int, dim: int, dtype: torch.dtype) -> None:
    queries, keys = vectors(tokens, dim, dtype)
    expected = attention_profile_reference(queries, keys, Attention(0.1), lags=67)
    check(attention_profile(queries, keys, Attention(0.1), lags=67), expected)


@pytest.mark.parametrize("window", [None, 31])
@pytest.mark.usefixtures("poison")
def test_seams_between_tiles(window: int | None) -> None:
    queries, keys = vectors(101)
    expected = attention_profile_reference(queries, keys, Attention(0.3, window), lags=37)
    sums = profile_sums(Chunk(queries, keys, 0.3, window, tiling=SMALL), lags=37, sink_tokens=4)
    assert set(sums) == SUMS
    check_sums(sums, {name: getattr(expected, name) for name in SUMS})


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.usefixtures("on_kernels")
def test_chunks_add_up(window: int | None) -> None:
    queries, keys = vectors(71)
    attention = Attention(0.3, window)
    total: AttentionProfile | None = None
    for start, end in ((0, 29), (29, 30), (30, 71)):
        first = max(0, start - window) if window else 0
        chunk = queries[:, start:end], keys[:, first:end], attention, 19
        previous = queries[:, start - 1] if start else None
        profile = attention_profile(*chunk, start, first, previous)
        if total is None:
            total = profile
        else:
            total.add(profile)
    assert total is not None
    check(total, attention_profile_reference(queries, keys, attention, lags=19))


def test_sizes_it_does_not_take_are_left_to_blocks(on_kernels: list[str]) -> None:
    queries, keys = (x.double() for x in vectors(11))
    assert kernels.autocorrelation_sums(queries[..., :0], 3) is None
    how = {"scale": 1.0, "window": None, "softcap": None, "query_start": 0, "key_start": 0}
    assert kernels.profile_sums(queries, keys, 3, 4, **how, has_previous=False) is None  # type: ignore[arg-type]
    assert on_kernels == []
