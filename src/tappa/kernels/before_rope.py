"""What the analysis needs of vectors before RoPE, from those after it and without storing them.

`R_t^-1` is taken from a table of cosines and sines by position. For the change over u steps it is
not needed: `|R_(t+u)^-1 x_(t+u) - R_t^-1 x_t| = |R_u^-1 x_(t+u) - x_t|` in every channel.
"""

import functools
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tappa.kernels.similarity import TINY, TURN

STEPS, PROGRAMS = 32, 64  # steps of a tile, and programs of each head


class Layout(NamedTuple):
    """Where the two dimensions of a channel are: FIRST + m STEP and SECOND + m STEP."""

    FIRST: int
    SECOND: int
    STEP: int
    PAIRS: int
    BLOCK: int

    @classmethod
    def of(cls, first: slice, second: slice, pairs: int) -> "Layout":
        return cls(first.start, second.start, first.step, pairs, triton.next_power_of_2(pairs))


@triton.jit
@no_type_check
def _pairs(base, at, end, row, m, FIRST, SECOND, STEP, PAIRS):
    """Both dimensions of every channel at some steps below `end`, in float32."""
    there = ((at >= 0) & (at < end))[:, None] & (m < PAIRS)[None, :]
    where = base + at.to(tl.int64)[:, None] * row + m[None, :] * STEP
    x = tl.load(where + FIRST, mask=there, other=0.0).to(tl.float32)
    return x, tl.load(where + SECOND, mask=there, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _turned_back(base, at, end, row, m, cos, sin, FIRST, SECOND, STEP, PAIRS):
    """The same before RoPE; row t of the tables (steps, PAIRS) is for step t."""
    x, y = _pairs(base, at, end, row, m, FIRST, SECOND, STEP, PAIRS)
    there = (at < end)[:, None] & (m < PAIRS)[None, :]
    turn = at[:, None] * PAIRS + m[None, :]
    c = tl.load(cos + turn, mask=there, other=0.0)
    s = tl.load(sin + turn, mask=there, other=0.0)
    return x * c + y * s, y * c - x * s


@triton.jit(do_not_specialize=["steps"])
@no_type_check
def _units(
    vectors, cos, sin, out, steps, head_stride, row,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Unit vectors before RoPE of ROWS steps of one head, into `out` (heads, steps, 2 PAIRS)."""
    head = tl.program_id(1).to(tl.int64)
    at, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base = vectors + head * head_stride
    x, y = _turned_back(base, at, steps, row, m, cos, sin, FIRST, SECOND, STEP, PAIRS)
    inverse = tl.rsqrt(tl.maximum(tl.sum(x * x + y * y, 1), TINY))[:, None]
    where = out + (head * steps + at)[:, None] * 2 * PAIRS + m[None, :] * STEP
    there = (at < steps)[:, None] & (m < PAIRS)[None, :]
    tl.store(where + FIRST, (x * inverse).to(out.dtype.element_ty), mask=there)
    tl.store(where + SECOND, (y * inverse).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["steps"])
@no_type_check
def _moments(
    queries, cos, sin, partial, steps, head_stride, row,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of `d = q_t - q_middle` before RoPE by dimension, and of `|d|^2` by channel.

    Into `partial` (heads, programs, 3 PAIRS). Measured from a query of the head itself, squares do
    not drown the variance where the mean is large.
    """
    program, head, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    m, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    base = queries + head.to(tl.int64) * head_stride
    none = tl.zeros((1,), tl.int32)
    x0, y0 = _turned_back(
        base, none + steps // 2, steps, row, m, cos, sin, FIRST, SECOND, STEP, PAIRS
    )
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    one, other, square = zero, zero, zero
    for first in range(program * ROWS, steps, programs * ROWS):
        at = first + r
        x, y = _turned_back(base, at, steps, row, m, cos, sin, FIRST, SECOND, STEP, PAIRS)
        there = (at < steps)[:, None]
        x, y = tl.where(there, x - x0, 0.0), tl.where(there, y - y0, 0.0)
        one += x
        other += y
        square += x * x + y * y
    out = partial + (head * programs + program).to(tl.int64) * 3 * PAIRS
    tl.store(out + FIRST + m * STEP, tl.sum(one, 0), mask=m < PAIRS)
    tl.store(out + SECOND + m * STEP, tl.sum(other, 0), mask=m < PAIRS)
    tl.store(out + 2 * PAIRS + m, tl.sum(square, 0), mask=m < PAIRS)


@triton.jit(do_not_specialize=["steps", "heads"])
@no_type_check
def _changes(
    queries, shifts, theta, partial, steps, heads, head_stride, row,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of `|R_u^-1 q_(t+u) - q_t|^2` into `partial` (shifts, heads, programs, PAIRS)."""
    program, programs, which = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    head = which % heads
    m, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    base = queries + head.to(tl.int64) * head_stride
    u = tl.load(shifts + which)
    turns = u.to(tl.float64) * tl.load(theta + m, mask=m < PAIRS, other=0.0) / TURN
    angle = ((turns - tl.floor(turns + 0.5)) * TURN).to(tl.float32)[None, :]
    c, s = tl.cos(angle), tl.sin(angle)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, steps - u, programs * ROWS):
        at = first + r
        x, y = _pairs(base, at, steps - u, row, m, FIRST, SECOND, STEP, PAIRS)
        far = tl.where(at < steps - u, at + u, -1)
        x_then, y_then = _pairs(base, far, steps, row, m, FIRST, SECOND, STEP, PAIRS)
        x = x_then * c + y_then * s - x
        y = y_then * c - x_then * s - y
        total += x * x + y * y
    out = partial + (which * programs + program).to(tl.int64) * PAIRS + m
    tl.store(out, tl.sum(total, 0), mask=m < PAIRS)


def unit_vectors(vectors: Tensor, table: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """Unit vectors before RoPE, in float16; zero vectors stay zero."""
    heads, steps, dim = vectors.shape
    out = torch.empty(heads, steps, dim, dtype=torch.float16, device=vectors.device)
    _units[triton.cdiv(steps, STEPS), heads](
        *(vectors, *table, out, steps, *vectors.stride()[:2]), **layout._asdict(), ROWS=STEPS
    )
    return out


def query_sums(
    queries: Tensor,
    table: tuple[Tensor, Tensor],
    layout: Layout,
    theta: Tensor,
    shifts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the queries (heads, steps, dim) before RoPE, in float64.

    Of `d_t = q_t - q_(steps // 2)`: (heads, dim); of `|d_t|^2` in every channel: (heads, pairs); of
    `|q_(t+u) - q_t|^2` in every channel, for u in `shifts` (shifts, heads): (shifts, heads, pairs).
    """
    heads, steps, dim = queries.shape
    programs, many = min(PROGRAMS, triton.cdiv(steps, STEPS)), len(shifts)
    new = functools.partial(torch.empty, dtype=torch.float32, device=queries.device)
    moments = new(heads, programs, dim + layout.PAIRS)
    changes = new(many, heads, programs, layout.PAIRS)
    strides = queries.stride()[:2]
    _moments[programs, heads](
        *(queries, *table, moments, steps, *strides), **layout._asdict(), ROWS=STEPS
    )
    _changes[programs, many * heads](
        *(queries, shifts, theta, changes, steps, heads, *strides),
        **layout._asdict(),
        ROWS=STEPS,
    )
    offset, squares = moments.sum(1, dtype=torch.float64).split([dim, layout.PAIRS], 1)
    return offset, squares, changes.sum(2, dtype=torch.float64)
