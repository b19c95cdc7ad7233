"""Self-similarity and RoPE energy of queries and keys in one pass over them, in Triton.

RoPE turns channel m of the vector at position t by `t theta_m`, so that sums of vectors before
RoPE are sums of vectors after it, each turned back. A thread walks over consecutive steps and
keeps `S <- R(theta) S + x_t`, as in Horner's rule, which leaves one turn of S for the end; no angle
depends on the step. Cosines of neighbours before RoPE need one turn by theta at the end.

It cannot serve compression, where a mask with holes leaves gaps between positions: `unit_queries`
reads the angles of every step instead.

Rows of a tile are stretches of steps. Programs beside each other take the heads of the same steps,
which lie beside each other in memory.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tappa.kernels.sums import VectorSums

TINY = tl.constexpr(1e-24)  # the square of what torch's normalize takes for 0
TURN = tl.constexpr(6.283185307179586)
PROGRAMS = 256  # enough for the processors of a GPU
SUMS = tl.constexpr(9)  # of every channel: 3 sums of vectors (x, y), norms, and of neighbours


@triton.jit
@no_type_check
def _pairs(
    base,
    at,
    tokens,
    row,
    FIRST,
    SECOND,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both dimensions of every channel of some steps."""
    m = tl.arange(0, BLOCK)
    where = base + at[:, None] * row + m[None, :] * STEP
    if MASKED or BLOCK != PAIRS:
        mask = ((at >= 0) & (at < tokens))[:, None] & (m < PAIRS)[None, :]
        x = tl.load(where + FIRST, mask=mask, other=0.0)
        return x, tl.load(where + SECOND, mask=mask, other=0.0)
    return tl.load(where + FIRST), tl.load(where + SECOND)


@triton.jit
@no_type_check
def _sweep(
    base,
    start,
    stride,
    tokens,
    row,
    cos,
    sin,
    FIRST,
    SECOND,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sums over `stride` steps of every row: (rows, channels), and how many vectors are not 0."""
    x, y = _pairs(base, start - 1, tokens, row, FIRST, SECOND, STEP, PAIRS, BLOCK, True)
    x, y = x.to(tl.float32), y.to(tl.float32)
    inverse = tl.rsqrt(tl.maximum(tl.sum(x * x + y * y, 1), TINY))[:, None]
    before_x, before_y = x * inverse, y * inverse
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    post_x, post_y, unit_x, unit_y, raw_x, raw_y = zero, zero, zero, zero, zero, zero
    norms, along, across = zero, zero, zero
    nonzero = tl.zeros((ROWS,), tl.float32)
    x, y = _pairs(base, start, tokens, row, FIRST, SECOND, STEP, PAIRS, BLOCK, True)
    for j in tl.range(0, stride, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if STAGES == 1:  # the next step is under way while this one is worked on
            x_now, y_now = x, y
            ahead = start + j + 1 if MASKED else tl.minimum(start + j + 1, tokens - 1)
            x, y = _pairs(base, ahead, tokens, row, FIRST, SECOND, STEP, PAIRS, BLOCK, MASKED)
            x_now, y_now = x_now.to(tl.float32), y_now.to(tl.float32)
        else:
            x, y = _pairs(base, start + j, tokens, row, FIRST, SECOND, STEP, PAIRS, BLOCK, MASKED)
            x_now, y_now = x.to(tl.float32), y.to(tl.float32)
        square = x_now * x_now + y_now * y_now
        length = tl.sum(square, 1)
        nonzero += tl.where(length > 0, 1.0, 0.0)
        inverse = tl.rsqrt(tl.maximum(length, TINY))[:, None]
        ux, uy = x_now * inverse, y_now * inverse
        post_x += ux
        post_y += uy
        unit_x, unit_y = cos * unit_x + (ux - sin * unit_y), cos * unit_y + (uy + sin * unit_x)
        raw_x, raw_y = cos * raw_x + (x_now - sin * raw_y), cos * raw_y + (y_now + sin * raw_x)
        norms += tl.sqrt(square)
        along = before_x * ux + (before_y * uy + along)
        across = before_x * uy - (before_y * ux - across)
        before_x, before_y = ux, uy
    return (post_x, post_y, unit_x, unit_y, raw_x, raw_y, norms, along, across), nonzero


@triton.jit(do_not_specialize=["tokens", "stride", "position", "query_heads"])
@no_type_check
def _sums_of_steps(
    queries,
    keys,
    theta,
    turn,
    partial,
    counts,
    tokens,
    stride,
    position,
    query_heads,
    query_head,
    query_row,
    key_head,
    key_row,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums over ROWS * stride steps of one head into `partial` (heads, programs, 9, PAIRS).

    Of unit vectors after RoPE, unit vectors before it, vectors before it (two each); norms; of
    neighbours as unit vectors, products `conj(u_(t-1)) u_t` (two). `counts` (heads, programs):
    vectors that are not 0.
    """
    head, programs = tl.program_id(0), tl.num_programs(1)
    program = programs - 1 - tl.program_id(1)  # the last steps first: masks take longer
    m, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    if head < query_heads:
        base, row = queries + head.to(tl.int64) * query_head, query_row
    else:
        base, row = keys + (head - query_heads).to(tl.int64) * key_head, key_row
    cos = tl.load(turn + m, mask=m < PAIRS, other=1.0)[None, :]
    sin = tl.load(turn + PAIRS + m, mask=m < PAIRS, other=0.0)[None, :]
    start = program * ROWS * stride + stride * r
    if (program + 1) * ROWS * stride <= tokens:
        sums, nonzero = _sweep(
            base, start, stride, tokens, row, cos, sin, FIRST, SECOND, STEP, PAIRS, BLOCK, ROWS,
            STAGES, UNROLL, False,
        )  # fmt: skip
    else:
        sums, nonzero = _sweep(
            base, start, stride, tokens, row, cos, sin, FIRST, SECOND, STEP, PAIRS, BLOCK, ROWS,
            STAGES, 1, True,
        )  # fmt: skip

    last = (position + start + stride - 1).to(tl.float64)[:, None]
    turns = last * (tl.load(theta + m, mask=m < PAIRS, other=0.0) / TURN)[None, :]
    angle = ((turns - tl.floor(turns + 0.5)) * TURN).to(tl.float32)  # in float32 only near 0
    cos, sin = tl.cos(angle), tl.sin(angle)
    post_x, post_y, ux, uy, x, y, norms, along, across = sums
    out = partial + (head * programs + program).to(tl.int64) * SUMS * PAIRS + m
    turned_back = (
        post_x, post_y, ux * cos + uy * sin, uy * cos - ux * sin,
        x * cos + y * sin, y * cos - x * sin, norms, along, across,
    )  # fmt: skip
    for i in tl.static_range(SUMS):
        tl.store(out + i * PAIRS, tl.sum(turned_back[i], 0), mask=m < PAIRS)
    tl.store(counts + head * programs + program, tl.sum(nonzero, 0))


@triton.jit(do_not_specialize=["programs"])
@no_type_check
def _sums_of_programs(
    partial,
    counts,
    turn,
    vectors,
    norms,
    numbers,
    programs,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """One of the sums of one head over all programs, in float64, where its reader wants it.

    `vectors` (heads, 3, dim), `norms` (heads, PAIRS), and `numbers` (heads, 3): cosines of
    neighbours after and before RoPE, and how many vectors are not 0.
    """
    head, which = tl.program_id(0), tl.program_id(1)
    m, p = tl.arange(0, BLOCK), tl.arange(0, EACH)
    start = partial + (head * programs).to(tl.int64) * SUMS * PAIRS + which * PAIRS
    one, other = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    nonzero = tl.zeros((EACH,), tl.float64)
    for first in range(0, programs, EACH):
        there = (first + p)[:, None] < programs
        where = start + (first + p)[:, None] * SUMS * PAIRS + m[None, :]
        mask = there & (m < PAIRS)[None, :]
        one += tl.sum(tl.load(where, mask=mask, other=0.0).to(tl.float64), 0)
        if which == 7:
            other += tl.sum(tl.load(where + PAIRS, mask=mask, other=0.0).to(tl.float64), 0)
            count = tl.load(
                counts + head * programs + first + p, mask=first + p < programs, other=0
            )
            nonzero += count.to(tl.float64)
    if which < 6:
        at = FIRST + (which % 2) * (SECOND - FIRST) + m * STEP
        tl.store(vectors + (head * 3 + which // 2) * 2 * PAIRS + at, one, mask=m < PAIRS)
    elif which == 6:
        tl.store(norms + head * PAIRS + m, one, mask=m < PAIRS)
    else:
        cos = tl.load(turn + m, mask=m < PAIRS, other=0.0).to(tl.float64)
        sin = tl.load(turn + PAIRS + m, mask=m < PAIRS, other=0.0).to(tl.float64)
        tl.store(numbers + head * 3, tl.sum(one, 0))
        tl.store(numbers + head * 3 + 1, tl.sum(one * cos + other * sin, 0))
        tl.store(numbers + head * 3 + 2, tl.sum(nonzero, 0))


@dataclass(frozen=True)
class Tiles:
    """Stretches of a program, steps of each (at least), warps, and how the loop over steps runs."""

    rows: int = 16
    steps: int = 256
    warps: int = 4
    stages: int = 1
    unroll: int = 2

    @classmethod
    def of(cls, heads: int, tokens: int) -> "Tiles":
        """Long stretches, as far as there is work for all processors of a GPU nonetheless."""
        steps = cls.steps
        while steps > 32 and heads * tokens < PROGRAMS * cls.rows * steps:
            steps //= 2
        return cls(steps=steps)


def vector_sums(
    queries: Tensor,
    keys: Tensor,
    first: slice,
    second: slice,
    theta: Tensor,
    turn: Tensor,
    start: int,
    tiles: Tiles | None = None,
) -> tuple[VectorSums, VectorSums]:
    """Sums of the queries and of the keys (heads, tokens, dim) of the positions from `start` on.

    Channel m is `(x[first][m], x[second][m])`, turned by `position * theta[m]`; no dimension is
    left out. `turn` (2, channels): cosine and sine of theta.
    """
    tokens, heads = queries.shape[1], len(queries) + len(keys)
    tiles, pairs = tiles or Tiles.of(heads, tokens), len(theta)
    programs = max(1, tokens // (tiles.rows * tiles.steps))
    layout = {
        "FIRST": first.start,
        "SECOND": second.start,
        "STEP": first.step,
        "PAIRS": pairs,
        "BLOCK": triton.next_power_of_2(pairs),
    }

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(heads, *shape, dtype=dtype, device=queries.device)

    partial = new(programs, SUMS.value, pairs, dtype=torch.float32)
    counts = new(programs, dtype=torch.float32)
    _sums_of_steps[heads, programs](
        *(queries, keys, theta, turn, partial, counts),
        *(tokens, triton.cdiv(tokens, tiles.rows * programs), start, len(queries)),
        *(*queries.stride()[:2], *keys.stride()[:2]),
        **layout,
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        UNROLL=tiles.unroll,
        num_warps=tiles.warps,
    )
    sums = new(3, 2 * pairs), new(pairs), new(3)
    _sums_of_programs[heads, SUMS.value - 1](
        *(partial, counts, turn, *sums, programs), **layout, EACH=16
    )
    return (
        _named(*(x[: len(queries)] for x in sums)),
        _named(*(x[len(queries) :] for x in sums)),
    )


def _named(vectors: Tensor, norms: Tensor, numbers: Tensor) -> VectorSums:
    (post, pre, raw), (after, before, squares) = vectors.unbind(1), numbers.unbind(1)
    return VectorSums(post, pre, raw, norms, after, before, squares)
