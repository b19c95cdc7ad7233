"""Sums over lags, for which only the band of keys that are near enough is visited."""

from typing import no_type_check

import triton
import triton.language as tl

from tappa.kernels.logits import PLACES, scaled, tile


@triton.jit
@no_type_check
def _sweep(
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
    """Walk down the rows from `first` to `last`, below `rows`; keys of row t start at t + ahead.

    Adds up `q.k` and weights, also where a row does not see a key: `bands_kernel` leaves those out.
    """
    products_sum, weights_sum = sums
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        at, index = row + r, row + ahead + c
        held = (index >= 0) & (index < past)
        q = tile(queries, at, at < rows, query_row, DIM, BLOCK_DIM, True)
        k = tile(keys, index, held, key_row, DIM, BLOCK_DIM, True)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        products_sum += products  # vectors that do not exist are 0
        if ATTENTION:
            row_lse = tl.load(lse + at, mask=at < rows, other=float("inf"))
            logits = scaled(products, scale, cap, SOFTCAP) - row_lse[:, None]
            if MASKED:
                logits = tl.where(held[None, :], logits, -float("inf"))
            weights_sum += tl.exp2(logits)
    return products_sum, weights_sum


@triton.jit(do_not_specialize=PLACES)
@no_type_check
def bands_kernel(
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
    sums = _sweep(
        sums, queries, keys, lse, row_start - key_start - behind, past, first, whole, last,
        scale, cap, query_row, key_row, DIM, BLOCK_DIM, ROWS, KEYS, True, SOFTCAP, ATTENTION,
        PRECISION, 1,
    )  # fmt: skip
    products, weights = _sweep(
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
