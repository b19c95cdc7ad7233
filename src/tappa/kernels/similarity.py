"""Self-similarity and RoPE energy of the vectors of a layer in one pass over them, in Triton.

RoPE turns channel m of the vector at position t by `t theta_m`, so that sums of vectors before
RoPE are sums of vectors after it, each turned back. A program takes rows with a stride,
`t = t0 + L r + j`: all rows r of a step j are turned by the same angle `j theta`, which leaves one turn by
`(t0 + L r) theta` for the end, and the neighbour of a row is the row at its place in the step before.
Cosines of neighbours before RoPE need one turn by theta at the end.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-12)  # as in torch's normalize
SUMS = 11


@triton.jit
@no_type_check
def _pairs(
    base,
    at,
    exists,
    row,
    FIRST,
    SECOND,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both dimensions of every channel of some rows, in float32."""
    m = tl.arange(0, BLOCK)
    where = base + at[:, None] * row + m[None, :] * STEP
    mask = exists[:, None] & (m < PAIRS)[None, :]
    x = tl.load(where + FIRST, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(where + SECOND, mask=mask, other=0.0).to(tl.float32)
    return x, y


@triton.jit
@no_type_check
def _similarity(
    vectors,
    steps,
    row_turns,
    out,
    tokens,
    stride,
    vector_head,
    vector_row,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over ROWS * stride rows of one head.

    `steps` (stride, 2, PAIRS): cosine and sine of `j theta`; `row_turns` (programs, ROWS, 2, PAIRS) those of
    `(t0 + stride r) theta`. `out` (heads, programs, 11, PAIRS), by channel: unit vectors after RoPE, before
    it, vectors before RoPE, (two each); norms; squares; of neighbours as unit vectors,
    products (`conj(u_(t-1)) u_t`, two); and in the first channel how many are not 0.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    vectors += head.to(tl.int64) * vector_head
    m, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    start = program * ROWS * stride + stride * r
    at = start - 1
    bx, by = _pairs(
        vectors, at, (at >= 0) & (at < tokens), vector_row, FIRST, SECOND, STEP, PAIRS, BLOCK
    )
    inverse = (1 / tl.maximum(tl.sqrt(tl.sum(bx * bx + by * by, 1)), TINY))[:, None]
    bx, by = bx * inverse, by * inverse
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    post_x, post_y, unit_x, unit_y, raw_x, raw_y = zero, zero, zero, zero, zero, zero
    norms, squares, along, across = zero, zero, zero, zero
    nonzero = tl.zeros((ROWS,), tl.float32)
    for j in tl.range(0, stride, num_stages=STAGES):
        at = start + j
        x, y = _pairs(vectors, at, at < tokens, vector_row, FIRST, SECOND, STEP, PAIRS, BLOCK)
        c = tl.load(steps + 2 * j * PAIRS + m, mask=m < PAIRS, other=0.0)[None, :]
        s = tl.load(steps + (2 * j + 1) * PAIRS + m, mask=m < PAIRS, other=0.0)[None, :]
        square = x * x + y * y
        length = tl.sum(square, 1)
        nonzero += tl.where(length > 0, 1.0, 0.0)
        inverse = (1 / tl.maximum(tl.sqrt(length), TINY))[:, None]
        ux, uy = x * inverse, y * inverse
        back_x, back_y = x * c + y * s, y * c - x * s
        post_x += ux
        post_y += uy
        raw_x += back_x
        raw_y += back_y
        unit_x += inverse * back_x
        unit_y += inverse * back_y
        norms += tl.sqrt(square)
        squares += square
        along += bx * ux + by * uy
        across += bx * uy - by * ux
        bx, by = ux, uy

    turns = row_turns + program * ROWS * 2 * PAIRS + r[:, None] * 2 * PAIRS + m[None, :]
    mask = (m < PAIRS)[None, :]
    c = tl.load(turns, mask=mask, other=0.0)
    s = tl.load(turns + PAIRS, mask=mask, other=0.0)
    out += (head * tl.num_programs(0) + program).to(tl.int64) * 11 * PAIRS + m
    sums = (
        post_x, post_y, unit_x * c + unit_y * s, unit_y * c - unit_x * s,
        raw_x * c + raw_y * s, raw_y * c - raw_x * s, norms, squares, along, across,
    )  # fmt: skip
    for i in tl.static_range(10):
        tl.store(out + i * PAIRS, tl.sum(sums[i], 0), mask=m < PAIRS)
    tl.store(out + 10 * PAIRS, tl.where(m == 0, tl.sum(nonzero, 0), 0.0), mask=m < PAIRS)


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, steps of a program (at least), warps, and loads in flight."""

    rows: int = 16
    steps: int = 64
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class VectorSums:
    """Sums over the steps of one chunk, for every head, in float64."""

    post: Tensor  # (heads, dim) unit vectors after RoPE
    pre: Tensor  # (heads, dim) unit vectors before RoPE
    squares: Tensor  # (heads,) squared lengths of unit vectors: 1, or 0 for a vector of zeros
    adjacent_post: Tensor  # (heads,) cosines of neighbouring steps
    adjacent_pre: Tensor
    vectors: Tensor  # (heads, dim) vectors before RoPE
    norms: Tensor  # (heads, pairs) lengths in each channel
    energies: Tensor  # (heads, pairs) their squares


def vector_sums(
    vectors: Tensor,
    first: slice,
    second: slice,
    theta: Tensor,
    start: int,
    tiles: Tiles | None = None,
) -> VectorSums:
    """Sums of the vectors (heads, tokens, dim) of consecutive positions from `start` on.

    Channel m is `(x[first][m], x[second][m])`, turned by `position * theta[m]`; no dimension is left out.
    """
    heads, tokens, dim = vectors.shape
    tiles, pairs = tiles or Tiles(), dim // 2
    programs = max(1, tokens // (tiles.rows * tiles.steps))
    stride = triton.cdiv(tokens, tiles.rows * programs)
    at = start + stride * torch.arange(programs * tiles.rows, device=vectors.device)
    steps, row_turns = (_turns(n, theta) for n in (torch.arange(stride, device=vectors.device), at))
    out = torch.empty(heads, programs, SUMS, pairs, dtype=torch.float32, device=vectors.device)
    _similarity[programs, heads](
        *(vectors, steps, row_turns, out, tokens, stride, *vectors.stride()[:2]),
        FIRST=first.start,
        SECOND=second.start,
        STEP=first.step,
        PAIRS=pairs,
        BLOCK=triton.next_power_of_2(pairs),
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    sums = out.sum(1, dtype=torch.float64).unbind(1)
    along, across = sums[8], sums[9]

    def joined(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(heads, dim)
        out[:, first], out[:, second] = x, y
        return out

    return VectorSums(
        post=joined(*sums[0:2]),
        pre=joined(*sums[2:4]),
        squares=sums[10][:, 0],
        adjacent_post=along.sum(1),
        adjacent_pre=(along * theta.cos() + across * theta.sin()).sum(1),
        vectors=joined(*sums[4:6]),
        norms=sums[6],
        energies=sums[7],
    )


def _turns(at: Tensor, theta: Tensor) -> Tensor:
    """Cosine and sine of `at * theta`: (number, 2, pairs)."""
    angles = at[:, None].double() * theta
    return torch.stack([angles.cos(), angles.sin()], 1).float()
