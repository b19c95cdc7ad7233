"""Triton kernels of the analysis: which functions have one. `launching` decides when it runs.

Each function here returns None where its caller has to compute the same in another way: on a CPU,
without Triton, on shapes or types that the kernel does not take, and after it failed to compile or
to launch, of which one warning tells.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tappa.kernels.launching import choose
from tappa.kernels.sums import VectorSums
from tappa.rope import RotaryChannels

Result = TypeVar("Result")
TYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256


def profile_sums(
    queries: Tensor,
    keys: Tensor,
    lags: int,
    sink_tokens: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    query_start: int,
    key_start: int,
    has_previous: bool,
) -> dict[str, Tensor] | None:
    """The sums of an AttentionProfile, as `attention_profile` computes them in blocks."""

    def run() -> dict[str, Tensor]:
        from tappa.kernels.profile import Chunk
        from tappa.kernels.profile import profile_sums as compute

        how = (scale, window, softcap, query_start, key_start, has_previous)
        return compute(Chunk(_rows_whole(queries), _rows_whole(keys), *how), lags, sink_tokens)

    return _attempt("attention profile", run, queries, keys)


def autocorrelation_sums(unit: Tensor, lags: int) -> Tensor | None:
    """Sum of cosines of steps `lag` apart, (heads, lags), from unit vectors (heads, tokens, dim).

    Their numbers are rounded to float16, by 1/4096 at most: a cosine by less than 1e-3.
    """

    def run() -> Tensor:
        from tappa.kernels.profile import Chunk, band_sums

        half = unit.half()
        return band_sums(Chunk(half, half, 1.0), None, lags)[1]

    return _attempt("autocorrelation", run, unit)


def vector_sums(
    queries: Tensor, keys: Tensor, rotary: RotaryChannels, start: int
) -> tuple[VectorSums, VectorSums] | None:
    """Sums over the steps of queries and keys after RoPE, from position `start` on."""
    slices = rotary.slices
    if slices is None:
        return None

    def run() -> tuple[VectorSums, VectorSums]:
        from tappa.kernels.similarity import vector_sums as compute

        return compute(
            _rows_whole(queries), _rows_whole(keys), *slices, rotary.theta, rotary.turn, start
        )

    return _attempt("similarity", run, queries, keys)


def unit_vectors(vectors: Tensor, rotary: RotaryChannels, start: int) -> Tensor | None:
    """Unit vectors before RoPE (float16), from those after it at positions from `start` on."""
    slices = rotary.slices
    if slices is None:
        return None

    def run() -> Tensor:
        from tappa.kernels.before_rope import Layout
        from tappa.kernels.before_rope import unit_vectors as compute

        x = _rows_whole(vectors)
        table = rotary.table_from(start, x.shape[1])
        return compute(x, table, Layout.of(*slices, len(rotary.theta)))

    return _attempt("unit vectors", run, vectors)


def query_sums(
    queries: Tensor, rotary: RotaryChannels, start: int, shifts: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `QueryModel` needs of queries after RoPE at positions from `start` on.

    `shifts` (shifts, heads) are numbers of steps; `before_rope.query_sums` says what comes out.
    """
    slices = rotary.slices
    if slices is None:
        return None

    def run() -> tuple[Tensor, Tensor, Tensor]:
        from tappa.kernels.before_rope import Layout
        from tappa.kernels.before_rope import query_sums as compute

        x = _rows_whole(queries)
        table = rotary.table_from(start, x.shape[1])
        return compute(x, table, Layout.of(*slices, len(rotary.theta)), rotary.theta, shifts)

    return _attempt("query sums", run, queries)


def _attempt(kernel: str, run: Callable[[], Result], *vectors: Tensor) -> Result | None:
    """What `run` returns, or None where the kernel cannot serve or fails."""
    return choose(kernel, vectors[0], run, lambda: None) if _taken(*vectors) else None


def _taken(*vectors: Tensor) -> bool:
    """Vectors (heads, tokens, dim) of one type, and of sizes for which the kernels are made."""
    dtype, dim = vectors[0].dtype, vectors[0].shape[-1]
    same = all(x.dtype == dtype and x.device == vectors[0].device for x in vectors)
    # offsets within a head are 32-bit numbers
    near = all(x.numel() and x.shape[1] * max(x.stride(1), dim) < 2**31 for x in vectors)
    return dtype in TYPES and dim <= LARGEST_HEAD and same and near


def _rows_whole(x: Tensor) -> Tensor:
    """The same vectors, with the numbers of each next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
