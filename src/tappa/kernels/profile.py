"""What a layer's attention does, as Triton kernels: rows of the T x T matrix never leave a tile.

Pass 1 (`_rows`) gives the log-sum-exp and the entropy of every row. Pass 2 recomputes the logits
and sums what needs finished weights; the sums over lags have a kernel of their own, which sees
only the band of keys that are near enough (`_bands`).

Persistence compares a weight with its neighbours (t - 1, i) and (t - 1, i - 1), which in a plain
tile sit in other threads. So pass 2 picks its rows and keys with strides: with t = t0 + 15 r + j,
neighbouring rows are the same element of parts j - 1 and j of one tile, and with i = i0 + m c + l,
neighbouring keys are the same element of steps l - 1 and l of the loop. What one part or step holds is
computed twice at the seams, 1/15 and one step of a sweep.

Two designs of pass 2 give the same sums: in `_weights_of_queries` a program keeps its queries and walks
over keys (column mass by atomic additions), in `_weights_of_keys` it keeps its keys and walks over queries.
Logits are in units of log 2 throughout. A row that does not exist has an infinite log-sum-exp,
so that its weights are 0.
"""

from dataclasses import dataclass, replace
from typing import Literal, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
SINK_TOKENS = 4  # the first tokens of a prompt, where sinks sit
NOTHING = tl.constexpr(
    -1e30
)  # the logit of a key that is not seen: finite, so that 0 times it is 0


@triton.jit
@no_type_check
def _scaled(products, scale, cap, SOFTCAP: tl.constexpr):
    """Logits from `q.k`; with a cap, `scale` is that of the tanh's argument."""
    if SOFTCAP:
        return cap * (1 - 2 / (1 + tl.exp2(products * scale)))
    return products * scale


@triton.jit
@no_type_check
def _visible(rows, keys, window, WINDOW: tl.constexpr):
    """Which keys a row sees, by position."""
    seen = keys <= rows
    if WINDOW:
        seen = seen & (rows - keys < window)
    return seen


@triton.jit
@no_type_check
def _tile(
    base, at, exists, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Vectors at some rows: (rows, BLOCK_DIM)."""
    dims = tl.arange(0, BLOCK_DIM)
    where = base + at[:, None] * stride + dims[None, :]
    if MASKED:
        return tl.load(where, mask=exists[:, None] & (dims[None, :] < DIM), other=0.0)
    if BLOCK_DIM == DIM:
        return tl.load(where)
    return tl.load(where, mask=dims[None, :] < DIM, other=0.0)


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
def _sweep_of_rows(
    sums,
    q,
    position,
    keys,
    key_start,
    first,
    last,
    scale,
    cap,
    window,
    key_row,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take in the keys from `first` to `last` (exclusive), without MASKED a multiple of KEYS.

    `sums` of a row: its largest logit, and the sums of `e = 2^(logit - largest)` and
    `e (logit - largest)`.
    """
    top, total, spread = sums
    for key in tl.range(first, last, KEYS, num_stages=STAGES):
        index = key + tl.arange(0, KEYS)
        held = index < last
        k = _tile(keys, index, held, key_row, DIM, BLOCK_DIM, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _scaled(products, scale, cap, SOFTCAP)
        if MASKED:
            seen = _visible(position[:, None], index[None, :] + key_start, window, WINDOW)
            logits = tl.where(seen & held[None, :], logits, NOTHING)
            larger = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(larger > NOTHING, larger, 0.0)  # of a row that has seen a key
        else:
            larger = tl.maximum(top, _scaled(tl.max(products, 1), scale, cap, SOFTCAP))
            base = larger
        below = logits - base[:, None]
        weights = tl.exp2(below)
        fall = tl.where(total > 0, top - base, 0.0)
        shrink = tl.exp2(fall)
        spread = shrink * (spread + fall * total) + tl.sum(weights * below, 1)
        total = shrink * total + tl.sum(weights, 1)
        top = larger
    return top, total, spread


@triton.jit
@no_type_check
def _rows(
    queries,
    keys,
    lse,
    entropy,
    sink,
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SINK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pass 1: log-sum-exp of each row; normalised entropy and attention on the first keys, summed."""
    head = tl.program_id(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    at = program * ROWS + tl.arange(0, ROWS)
    exists = at < rows
    position = row_start + at
    queries += head.to(tl.int64) * query_head + (program * ROWS).to(tl.int64) * query_row
    keys += (head // GROUP).to(tl.int64) * key_head
    q = _tile(queries, tl.arange(0, ROWS), exists, query_row, DIM, BLOCK_DIM, True)

    first = 0  # keys are counted from the first one held
    sure = row_start + program * ROWS + 1 - key_start  # all rows see the keys before it
    end = tl.minimum(sure + ROWS - 1, past)
    sums = (
        tl.full((ROWS,), NOTHING, tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    if WINDOW:
        first = tl.maximum(sure - window, 0)
        left = tl.minimum(tl.maximum(sure + ROWS - 1 - window, first), end)
        sums = _sweep_of_rows(
            sums, q, position, keys, key_start, first, left, scale, cap, window, key_row,
            DIM, BLOCK_DIM, KEYS, True, WINDOW, SOFTCAP, PRECISION, 1,
        )  # fmt: skip
        first = left
    middle = first + tl.maximum(sure - first, 0) // KEYS * KEYS
    sums = _sweep_of_rows(
        sums, q, position, keys, key_start, first, middle, scale, cap, window, key_row,
        DIM, BLOCK_DIM, KEYS, False, WINDOW, SOFTCAP, PRECISION, STAGES,
    )  # fmt: skip
    top, total, spread = _sweep_of_rows(
        sums, q, position, keys, key_start, middle, end, scale, cap, window, key_row,
        DIM, BLOCK_DIM, KEYS, True, WINDOW, SOFTCAP, PRECISION, 1,
    )  # fmt: skip

    total = tl.maximum(total, 1e-30)  # 0 in rows that do not exist
    found = top + tl.log2(total)
    tl.store(lse + head.to(tl.int64) * lse_head + at, found, mask=exists)
    fresh = exists & (at >= first_fresh)
    seen_keys = (position + 1).to(tl.float32)
    if WINDOW:
        seen_keys = tl.minimum(seen_keys, window.to(tl.float32))
    of_row = (tl.log2(total) - spread / total) / tl.log2(tl.maximum(seen_keys, 2.0))
    where = head * tl.num_programs(0) + program
    tl.store(entropy + where, tl.sum(tl.where(fresh, of_row, 0.0), 0))

    index = tl.arange(0, 16) - key_start  # of the first keys of the prompt
    held = (tl.arange(0, 16) < SINK) & (index >= 0) & (index < past)
    k = _tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = _scaled(products, scale, cap, SOFTCAP) - found[:, None]
    seen = _visible(position[:, None], tl.arange(0, 16)[None, :], window, WINDOW) & held[None, :]
    counts = seen & (fresh & (position >= SINK))[:, None]
    weights = tl.exp2(tl.where(counts, logits, -float("inf")))
    tl.store(sink + where, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
@no_type_check
def _sweep_keys(
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
    UNROLL: tl.constexpr,
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
    k = _tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    logits = _scaled(products, scale, cap, SOFTCAP) - lse[None, :]
    seen = _visible(position[None, :], index[:, None] + key_start, window, WINDOW) & held[:, None]
    before = tl.exp2(tl.where(seen, logits, -float("inf")))
    for step in tl.range(0, stride, num_stages=STAGES, loop_unroll_factor=UNROLL):
        index = start + step
        held = index < last
        k = _tile(keys, index, held, key_row, DIM, BLOCK_DIM, MASKED)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        logits = _scaled(products, scale, cap, SOFTCAP) - lse[None, :]
        if MASKED:
            seen = _visible(position[None, :], index[:, None] + key_start, window, WINDOW)
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


@triton.jit
@no_type_check
def _weights_of_queries(
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
    UNROLL: tl.constexpr,
):
    """Pass 2 by queries: column p of the tile is row `t0 - 1 + (PARTS - 1) (p % R) + p // R`,
    R = QUERIES / PARTS. Part 0 is there to be compared with only.
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
    q = _tile(queries, offset, exists, query_row, DIM, BLOCK_DIM, True)
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
        sums = _sweep_keys(
            sums, q, lse, position, keys, column_mass, key_start, past, first, left,
            scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, True, WINDOW, SOFTCAP,
            PRECISION, 1, 1,
        )  # fmt: skip
        first = left
    middle = first + tl.maximum(sure - first, 0) // KEYS * KEYS
    sums = _sweep_keys(
        sums, q, lse, position, keys, column_mass, key_start, past, first, middle,
        scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, False, WINDOW, SOFTCAP,
        PRECISION, STAGES, UNROLL,
    )  # fmt: skip
    sums = _sweep_keys(
        sums, q, lse, position, keys, column_mass, key_start, past, middle, end,
        scale, cap, window, key_row, DIM, BLOCK_DIM, PARTS, KEYS, True, WINDOW, SOFTCAP,
        PRECISION, 1, 1,
    )  # fmt: skip
    where = head * tl.num_programs(0) + program
    tl.store(vertical + where, tl.sum(tl.sum(sums[0], 1), 0))
    tl.store(diagonal + where, tl.sum(tl.sum(sums[1], 1), 0))


@triton.jit
@no_type_check
def _sweep_queries(
    sums,
    k,
    column,
    lse,
    queries,
    key_start,
    past,
    row_start,
    rows,
    first,
    last,
    scale,
    cap,
    window,
    query_row,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Walk over the rows from `first` to `last` (exclusive), QUERIES at a time, with a stride.

    `sums` are column mass (of the rows of a quarter of a tile) and vertical and diagonal persistence so far.
    Without MASKED every row exists, sees all keys, and their number is a multiple of QUERIES.
    """
    mass, vertical, diagonal = sums
    stride = (last - first + QUERIES - 1) // QUERIES
    start = first + stride * tl.arange(0, QUERIES)
    held = (column >= 0) & (column < past)
    EACH: tl.constexpr = column.shape[0] // PARTS
    compared = tl.min(column, 0) + (PARTS - 1) * tl.arange(0, EACH) >= 0  # keys of part 0 that exist
    at = start - 1
    exists = (at >= 0) & (at < rows)
    q = _tile(queries, at, exists, query_row, DIM, BLOCK_DIM, True)
    row_lse = tl.load(lse + at, mask=exists, other=float("inf"))
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = _scaled(products, scale, cap, SOFTCAP) - row_lse[:, None]
    seen = _visible((at + row_start)[:, None], (column + key_start)[None, :], window, WINDOW)
    before = tl.exp2(tl.where(seen & held[None, :], logits, -float("inf")))
    for step in tl.range(0, stride, num_stages=STAGES, loop_unroll_factor=UNROLL):
        at = start + step
        exists = at < last
        q = _tile(queries, at, exists, query_row, DIM, BLOCK_DIM, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            row_lse = tl.load(lse + at, mask=exists, other=float("inf"))
            logits = _scaled(products, scale, cap, SOFTCAP) - row_lse[:, None]
            position = (at + row_start)[:, None]
            seen = _visible(position, (column + key_start)[None, :], window, WINDOW)
            logits = tl.where(seen & held[None, :], logits, -float("inf"))
        else:
            row_lse = tl.load(lse + at)
            logits = _scaled(products, scale, cap, SOFTCAP) - row_lse[:, None]
        weights = tl.exp2(logits)
        now, earlier = _parts(weights, PARTS), _parts(before, PARTS)
        vertical += tl.minimum(earlier[1], now[1])
        diagonal += tl.minimum(tl.where(compared[None, :], earlier[0], 0.0), now[1])
        for j in tl.static_range(2, PARTS):
            vertical += tl.minimum(earlier[j], now[j])
            diagonal += tl.minimum(earlier[j - 1], now[j])
        mass += tl.sum(tl.reshape(weights, (QUERIES // 16, 2, 8, weights.shape[1])), 1)
        before = weights
    return mass, vertical, diagonal


@triton.jit
@no_type_check
def _weights_of_keys(
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
    UNROLL: tl.constexpr,
):
    """Pass 2 by keys: column p of the tile is key `i0 - 1 + (PARTS - 1) (p % R) + p // R`,
    R = KEYS / PARTS. Part 0 is there to be compared with only.
    """
    EACH: tl.constexpr = KEYS // PARTS
    FRESH: tl.constexpr = EACH * (PARTS - 1)
    head = tl.program_id(1)
    program = tl.program_id(0)  # keys with many rows first
    p = tl.arange(0, KEYS)
    lowest = program * FRESH - 1
    column = lowest + (PARTS - 1) * (p % EACH) + p // EACH
    held = (column >= 0) & (column < past)
    keys += (head // GROUP).to(tl.int64) * key_head
    k = _tile(keys, column, held, key_row, DIM, BLOCK_DIM, True)
    queries += head.to(tl.int64) * query_head
    lse += head.to(tl.int64) * lse_head

    # rows that see any of these keys, and between `left` and `right` those that see them all
    nearest = lowest + 1 + key_start - row_start
    first = tl.maximum(nearest, first_fresh)
    end = rows
    left = tl.minimum(tl.maximum(nearest + FRESH - 1, first), end)
    right = end
    if WINDOW:
        end = tl.minimum(tl.maximum(nearest + FRESH - 1 + window, first), rows)
        left = tl.minimum(left, end)
        right = tl.minimum(tl.maximum(nearest - 1 + window, left), end)
    left = right - (right - left) // QUERIES * QUERIES
    sums = (
        tl.zeros((QUERIES // 16, 8, KEYS), tl.float32),
        tl.zeros((QUERIES, EACH), tl.float32),
        tl.zeros((QUERIES, EACH), tl.float32),
    )
    sums = _sweep_queries(
        sums, k, column, lse, queries, key_start, past, row_start, rows, first, left,
        scale, cap, window, query_row, DIM, BLOCK_DIM, PARTS, QUERIES, True, WINDOW, SOFTCAP,
        PRECISION, 1, 1,
    )  # fmt: skip
    sums = _sweep_queries(
        sums, k, column, lse, queries, key_start, past, row_start, rows, left, right,
        scale, cap, window, query_row, DIM, BLOCK_DIM, PARTS, QUERIES, False, WINDOW, SOFTCAP,
        PRECISION, STAGES, UNROLL,
    )  # fmt: skip
    if WINDOW:
        sums = _sweep_queries(
            sums, k, column, lse, queries, key_start, past, row_start, rows, right,
            end, scale, cap, window, query_row, DIM, BLOCK_DIM, PARTS, QUERIES, True, WINDOW,
            SOFTCAP, PRECISION, 1, 1,
        )  # fmt: skip
    where = head * tl.num_programs(0) + program
    tl.store(vertical + where, tl.sum(tl.sum(sums[1], 1), 0))
    tl.store(diagonal + where, tl.sum(tl.sum(sums[2], 1), 0))
    mass = tl.sum(tl.sum(sums[0], 0), 0)
    fresh = held & (tl.arange(0, KEYS) >= EACH)
    tl.store(column_mass + head.to(tl.int64) * mass_head + column, mass, mask=fresh)


@triton.jit
@no_type_check
def _sweep_band(
    sums,
    queries,
    keys,
    lse,
    ahead,
    past,
    first,
    last,
    rows,
    scale,
    cap,
    query_row,
    key_row,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ATTENTION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk down the rows from `first` to `last`, below `rows`; the keys of row t start at t + ahead.

    Adds up `q.k` and weights, also where a row does not see a key: that is for `_bands` to leave out.
    """
    products_sum, weights_sum = sums
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        at, index = row + r, row + ahead + c
        held = (index >= 0) & (index < past)
        q = _tile(queries, at, at < rows, query_row, DIM, BLOCK_DIM, True)
        k = _tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        products_sum += products  # vectors that do not exist are 0
        if ATTENTION:
            row_lse = tl.load(lse + at, mask=at < rows, other=float("inf"))
            logits = _scaled(products, scale, cap, SOFTCAP) - row_lse[:, None]
            if MASKED:
                logits = tl.where(held[None, :], logits, -float("inf"))
            weights_sum += tl.exp2(logits)
    return products_sum, weights_sum


@triton.jit
@no_type_check
def _bands(
    queries,
    keys,
    lse,
    lag_attention,
    lag_products,
    scale,
    cap,
    window,
    lags,
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ATTENTION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of `q.k`, and with ATTENTION of weights, at every distance t - i below `lags`.

    Every tile of a program lies at the same distance from the diagonal, so that tiles can be added
    element by element; only their sum is split by lag.
    """
    band = tl.program_id(0)  # keys from t0 + ROWS - KEYS (band + 1) on, t0 the first row of a tile
    split = tl.program_id(1)
    head = tl.program_id(2)
    queries += head.to(tl.int64) * query_head
    keys += (head // GROUP).to(tl.int64) * key_head
    lse += head.to(tl.int64) * lse_head
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    behind = KEYS * (band + 1) - ROWS
    lag = behind + r[:, None] - c[None, :]
    tiles = (rows - first_fresh + ROWS - 1) // ROWS
    each = (tiles + tl.num_programs(1) - 1) // tl.num_programs(1)
    first = first_fresh + split * each * ROWS
    last = tl.minimum(first + each * ROWS, rows)
    whole = behind + key_start - row_start  # from this row on, all keys of a tile are held
    whole = first + tl.cdiv(tl.maximum(tl.minimum(whole, last) - first, 0), ROWS) * ROWS
    sums = (tl.zeros((ROWS, KEYS), tl.float32), tl.zeros((ROWS, KEYS), tl.float32))
    sums = _sweep_band(
        sums, queries, keys, lse, row_start - key_start - behind, past, first, whole, last,
        scale, cap, query_row, key_row, DIM, BLOCK_DIM, ROWS, KEYS, True, SOFTCAP, ATTENTION,
        PRECISION, 1,
    )  # fmt: skip
    products, weights = _sweep_band(
        sums, queries, keys, lse, row_start - key_start - behind, past, whole, last, last,
        scale, cap, query_row, key_row, DIM, BLOCK_DIM, ROWS, KEYS, False, SOFTCAP, ATTENTION,
        PRECISION, STAGES,
    )  # fmt: skip
    shown = (lag >= 0) & (lag < lags)
    if WINDOW:
        shown = shown & (lag < window)
    out = head * lags + lag
    tl.atomic_add(lag_products + out, products, mask=shown, sem="relaxed")
    if ATTENTION:
        tl.atomic_add(lag_attention + out, weights, mask=shown, sem="relaxed")


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of one kernel, warps for each, and how its loops run."""

    queries: int
    keys: int
    parts: int = 1  # in how many parts pass 2 cuts the tile of what its programs keep
    warps: int = 4
    stages: int = 3  # loads in flight
    unroll: int = 1


@dataclass(frozen=True)
class Tiling:
    """How the three kernels run."""

    rows: Tiles = Tiles(128, 128, warps=8)
    weights: Tiles = Tiles(128, 64, parts=16)
    bands: Tiles = Tiles(64, 64, stages=2)
    keep: Literal["queries", "keys"] = "queries"  # what a program of pass 2 keeps


@dataclass(frozen=True)
class Chunk:
    """Queries (heads, rows, dim) and keys (kv_heads, past, dim) of one chunk, and how they attend.

    With `has_previous` the first row is that of the step before the chunk.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    window: int | None
    softcap: float | None
    query_start: int
    key_start: int
    has_previous: bool
    tiling: Tiling

    def new(self, *shape: int, zero: bool = False) -> Tensor:
        """A buffer with heads first."""
        make = torch.zeros if zero else torch.empty
        return make(len(self.queries), *shape, dtype=torch.float32, device=self.queries.device)

    def grid(self, *programs: int) -> tuple[int, ...]:
        return (*programs, len(self.queries))

    @property
    def scales(self) -> tuple[float, float]:
        """Scale and cap with the logarithm's base folded in."""
        if self.softcap is None:
            return self.scale * LOG2E, 1.0
        # cap * tanh(x / cap) = cap * (1 - 2 / (1 + e^(2 x / cap)))
        return 2 * self.scale / self.softcap * LOG2E, self.softcap * LOG2E

    @property
    def places(self) -> tuple[int, ...]:
        """Number of rows, first fresh row, position of row 0, number of keys, position of key 0."""
        fresh = int(self.has_previous)
        rows, past = self.queries.shape[1], self.keys.shape[1]
        return rows, fresh, self.query_start - fresh, past, self.key_start

    @property
    def strides(self) -> tuple[int, ...]:
        """Of heads and rows of the queries, of the keys, and of the heads of the log-sum-exp."""
        return *self.queries.stride()[:2], *self.keys.stride()[:2], self.queries.shape[1]

    def constants(self, tiles: Tiles) -> dict[str, object]:
        """What kernels are compiled for."""
        dim = self.queries.shape[-1]
        return {
            "GROUP": len(self.queries) // len(self.keys),
            "DIM": dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
            "WINDOW": self.window is not None,
            "SOFTCAP": self.softcap is not None,
            "PRECISION": "tf32x3" if self.queries.dtype == torch.float32 else "ieee",
            "STAGES": tiles.stages,
            "num_warps": tiles.warps,
        }


def row_sums(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1: log-sum-exp in units of log 2 (heads, rows), entropy and sink mass (heads, programs)."""
    tiles, rows = chunk.tiling.rows, chunk.queries.shape[1]
    programs = triton.cdiv(rows, tiles.queries)
    lse, entropy, sink = chunk.new(rows), chunk.new(programs), chunk.new(programs)
    _rows[chunk.grid(programs)](
        *(chunk.queries, chunk.keys, lse, entropy, sink, *chunk.scales, chunk.window or 0),
        *(*chunk.places, *chunk.strides),
        **chunk.constants(tiles),
        SINK=SINK_TOKENS,
        ROWS=tiles.queries,
        KEYS=tiles.keys,
    )
    return lse, entropy, sink


def weight_sums(chunk: Chunk, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2: column mass (heads, past), vertical and diagonal persistence (heads, programs)."""
    tiles, by_queries = chunk.tiling.weights, chunk.tiling.keep == "queries"
    rows, fresh, _, past, _ = chunk.places
    kept, held = (tiles.queries, rows - fresh) if by_queries else (tiles.keys, past)
    programs = triton.cdiv(held, kept // tiles.parts * (tiles.parts - 1))
    vertical, diagonal = chunk.new(programs), chunk.new(programs)
    column_mass = chunk.new(past, zero=by_queries)
    kernel = _weights_of_queries if by_queries else _weights_of_keys
    kernel[chunk.grid(programs)](
        *(chunk.queries, chunk.keys, lse, column_mass, vertical, diagonal, *chunk.scales),
        *(chunk.window or 0, *chunk.places, *chunk.strides, past),
        **chunk.constants(tiles),
        QUERIES=tiles.queries,
        PARTS=tiles.parts,
        KEYS=tiles.keys,
        UNROLL=tiles.unroll,
    )
    return column_mass, vertical, diagonal


def band_sums(chunk: Chunk, lse: Tensor | None, lags: int) -> tuple[Tensor, Tensor]:
    """Weights (0 without `lse`) and `q.k` at every distance below `lags`, summed: (heads, lags)."""
    tiles = chunk.tiling.bands
    rows, fresh, *_ = chunk.places
    bands = triton.cdiv(min(lags, chunk.window or lags) - 1 + tiles.queries, tiles.keys)
    splits = max(1, min(16, (rows - fresh) // (8 * tiles.queries)))
    attention, products = chunk.new(lags, zero=True), chunk.new(lags, zero=True)
    _bands[chunk.grid(bands, splits)](
        *(chunk.queries, chunk.keys, attention if lse is None else lse, attention, products),
        *(*chunk.scales, chunk.window or 0, lags, *chunk.places, *chunk.strides),
        **chunk.constants(tiles),
        ROWS=tiles.queries,
        KEYS=tiles.keys,
        ATTENTION=lse is not None,
    )
    return attention, products


def profile_sums(chunk: Chunk, lags: int) -> dict[str, Tensor]:
    """The sums of an AttentionProfile of one chunk: (heads, ...) in float64."""
    if triton.knobs.runtime.interpret and chunk.queries.dtype == torch.bfloat16:
        # the interpreter multiplies bfloat16 as if it were whole numbers
        chunk = replace(chunk, queries=chunk.queries.float(), keys=chunk.keys.float())
    lse, entropy, sink = row_sums(chunk)
    column_mass, vertical, diagonal = weight_sums(chunk, lse)
    lag_attention, lag_products = band_sums(chunk, lse, lags)
    return {
        "sink_mass": sink.sum(1, dtype=torch.float64),
        "entropy": entropy.sum(1, dtype=torch.float64),
        "vertical": vertical.sum(1, dtype=torch.float64),
        "diagonal": diagonal.sum(1, dtype=torch.float64),
        "column_mass": torch.nn.functional.pad(column_mass.double(), (chunk.key_start, 0)),
        "lag_attention": lag_attention.double(),
        "lag_logits": chunk.scale * lag_products.double(),
    }


def tiling_of(queries: Tensor) -> Tiling:
    """The tiling for a type and a head size: what fits into the shared memory of a processor."""
    row_bytes = queries.element_size() * triton.next_power_of_2(queries.shape[-1])
    if row_bytes > 256:
        tiles = Tiles(64, 64, stages=2 if row_bytes <= 512 else 1)
        return Tiling(tiles, replace(tiles, parts=8), tiles)
    return Tiling()
