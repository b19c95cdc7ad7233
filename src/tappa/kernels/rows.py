"""Pass 1 of the attention profile: the log-sum-exp and the entropy of every row."""

from typing import no_type_check

import triton
import triton.language as tl

from tappa.kernels.logits import NOTHING, PLACES, scaled, tile, visible


@triton.jit
@no_type_check
def _sweep(
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
        k = tile(keys, index, held, key_row, DIM, BLOCK_DIM, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = scaled(products, scale, cap, SOFTCAP)
        if MASKED:
            seen = visible(position[:, None], index[None, :] + key_start, window, WINDOW)
            logits = tl.where(seen & held[None, :], logits, NOTHING)
            larger = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(larger > NOTHING, larger, 0.0)  # of a row that has seen a key
        else:
            larger = tl.maximum(top, scaled(tl.max(products, 1), scale, cap, SOFTCAP))
            base = larger
        below = logits - base[:, None]
        weights = tl.exp2(below)
        fall = tl.where(total > 0, top - base, 0.0)
        shrink = tl.exp2(fall)
        spread = shrink * (spread + fall * total) + tl.sum(weights * below, 1)
        total = shrink * total + tl.sum(weights, 1)
        top = larger
    return top, total, spread


@triton.jit(do_not_specialize=PLACES)
@no_type_check
def rows_kernel(
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
    """Log-sum-exp of each row; normalised entropy and attention on the first keys, summed."""
    head = tl.program_id(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    at = program * ROWS + tl.arange(0, ROWS)
    exists = at < rows
    position = row_start + at
    queries += head.to(tl.int64) * query_head + (program * ROWS).to(tl.int64) * query_row
    keys += (head // GROUP).to(tl.int64) * key_head
    q = tile(queries, tl.arange(0, ROWS), exists, query_row, DIM, BLOCK_DIM, True)

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
        sums = _sweep(
            sums, q, position, keys, key_start, first, left, scale, cap, window, key_row,
            DIM, BLOCK_DIM, KEYS, True, WINDOW, SOFTCAP, PRECISION, 1,
        )  # fmt: skip
        first = left
    middle = first + tl.maximum(sure - first, 0) // KEYS * KEYS
    sums = _sweep(
        sums, q, position, keys, key_start, first, middle, scale, cap, window, key_row,
        DIM, BLOCK_DIM, KEYS, False, WINDOW, SOFTCAP, PRECISION, STAGES,
    )  # fmt: skip
    top, total, spread = _sweep(
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
    k = tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = scaled(products, scale, cap, SOFTCAP) - found[:, None]
    seen = visible(position[:, None], tl.arange(0, 16)[None, :], window, WINDOW) & held[None, :]
    counts = seen & (fresh & (position >= SINK))[:, None]
    weights = tl.exp2(tl.where(counts, logits, -float("inf")))
    tl.store(sink + where, tl.sum(tl.sum(weights, 1), 0))
