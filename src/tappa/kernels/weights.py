"""Pass 2 of the attention profile: what needs finished weights, from logits computed again.

Persistence compares a weight with its neighbours (t - 1, i) and (t - 1, i - 1), which in a plain
tile sit in other threads. So rows and keys are picked with strides: with t = t0 + 15 r + j,
neighbouring rows are the same element of parts j - 1 and j of one tile, and with i = i0 + m c + l,
neighbouring keys are the same element of steps l - 1 and l of the loop. What one part or step
holds is computed twice at the seams, 1/15 and one step of a sweep.
"""

from typing import no_type_check

import triton
import triton.language as tl

from tappa.kernels.logits import PLACES, scaled, tile, visible


@triton.jit
@no_type_check
def _halves(x):
    """The left and the right half of a tile's columns; no data moves between threads."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
@no_type_check
def _parts(x, PARTS: tl.constexpr):
    """The columns of a tile as PARTS tiles, from left to right."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = _halves(x)
        return _parts(left, PARTS // 2) + _parts(right, PARTS // 2)


@triton.jit
@no_type_check
def _sweep(
    sums,
    q,
    lse,
    position,
    keys,
    column_mass,
    key_start,
    past,
    first,
    last,
    scale,
    cap,
    window,
    key_row,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk over the keys from `first` to `last` (exclusive), KEYS at a time, with a stride.

    `sums` are the vertical and the diagonal persistence so far. Without MASKED every key exists, is
    seen by all rows, and their number is a multiple of KEYS.
    """
    vertical, diagonal = sums
    stride = (last - first + KEYS - 1) // KEYS
    start = first + stride * tl.arange(0, KEYS)
    index = start - 1
    held = (index >= 0) & (index < past)
    k = tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    logits = scaled(products, scale, cap, SOFTCAP) - lse[None, :]
    seen = visible(position[None, :], index[:, None] + key_start, window, WINDOW) & held[:, None]
    before = tl.exp2(tl.where(seen, logits, -float("inf")))
    for step in tl.range(0, stride, num_stages=STAGES):
        index = start + step
        held = index < last
        k = tile(keys, index, held, key_row, DIM, BLOCK_DIM, MASKED)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        logits = scaled(products, scale, cap, SOFTCAP) - lse[None, :]
        if MASKED:
            seen = visible(position[None, :], index[:, None] + key_start, window, WINDOW)
            logits = tl.where(seen & held[:, None], logits, -float("inf"))
        weights = tl.exp2(logits)
        now, earlier = _parts(weights, PARTS), _parts(before, PARTS)
        mass = now[1]
        vertical += tl.minimum(now[0], now[1])
        diagonal += tl.minimum(earlier[0], now[1])
        for j in tl.static_range(2, PARTS):
            mass += now[j]
            vertical += tl.minimum(now[j - 1], now[j])
            diagonal += tl.minimum(earlier[j - 1], now[j])
        tl.atomic_add(column_mass + index, tl.sum(mass, 1), mask=held, sem="relaxed")
        before = weights
    return vertical, diagonal


@triton.jit(do_not_specialize=PLACES)
@no_type_check
def weights_kernel(
    queries,
    keys,
    lse,
    column_mass,
    vertical,
    diagonal,
    scale,
    cap,
    window,
    rows,
    first_fresh,
    row_start,
    past,
    key_start,
    query_head,
    query_row,
    key_head,
    key_row,
    lse_head,
    mass_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pass 2: column p of the tile is row `t0 - 1 + (PARTS - 1) (p % R) + p // R`,
    R = QUERIES / PARTS. Part 0 is there to be compared with only. A row that does not exist has an
    infinite log-sum-exp, so that its weights are 0.
    """
    EACH: tl.constexpr = QUERIES // PARTS
    FRESH: tl.constexpr = EACH * (PARTS - 1)
    head = tl.program_id(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    column = tl.arange(0, QUERIES)
    lowest = first_fresh + program * FRESH - 1
    offset = (PARTS - 1) * (column % EACH) + column // EACH
    at = lowest + offset
    exists = (at >= 0) & (at < rows)
    position = row_start + at
    queries += head.to(tl.int64) * query_head + lowest.to(tl.int64) * query_row
    q = tile(queries, offset, exists, query_row, DIM, BLOCK_DIM, True)
    lse = tl.load(lse + head.to(tl.int64) * lse_head + at, mask=exists, other=float("inf"))
    keys += (head // GROUP).to(tl.int64) * key_head
    column_mass += head.to(tl.int64) * mass_head

    first = 0  # keys are counted from the first one held
    sure = row_start + lowest + 1 - key_start  # all rows see the keys before it
    end = tl.minimum(sure + FRESH, past)
    sums = (tl.zeros((KEYS, EACH), tl.float32), tl.zeros((KEYS, EACH), tl.float32))
    if WINDOW:
        first = tl.maximum(sure - window, 0)
        left = tl.minimum(tl.maximum(sure + FRESH - window, first), end)
        sums = _sweep(
            sums, q, lse, position, keys, column_mass, key_start, past, first, left,
            scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, True, WINDOW, SOFTCAP,
            PRECISION, 1,
        )  # fmt: skip
        first = left
    middle = first + tl.maximum(sure - first, 0) // KEYS * KEYS
    sums = _sweep(
        sums, q, lse, position, keys, column_mass, key_start, past, first, middle,
        scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, False, WINDOW, SOFTCAP,
        PRECISION, STAGES,
    )  # fmt: skip
    sums = _sweep(
        sums, q, lse, position, keys, column_mass, key_start, past, middle, end,
        scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, True, WINDOW, SOFTCAP,
        PRECISION, 1,
    )  # fmt: skip
    where = head * tl.num_programs(0) + program
    tl.store(vertical + where, tl.sum(tl.sum(sums[0], 1), 0))
    tl.store(diagonal + where, tl.sum(tl.sum(sums[1], 1), 0))
