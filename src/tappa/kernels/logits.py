"""What the kernels of the attention profile share: vectors of a tile, logits, and who sees whom.

Logits are in units of log 2 throughout.
"""

from typing import no_type_check

import triton
import triton.language as tl

# Whole numbers for which no kernel is compiled again: places and lengths differ with every prompt
PLACES = [
    *("window", "lags", "rows", "first_fresh", "row_start", "past", "key_start"),
    *("lse_head", "mass_head"),
]
NOTHING = tl.constexpr(
    -1e30
)  # the logit of a key that is not seen: finite, so that 0 times it is 0


@triton.jit
@no_type_check
def scaled(products, scale, cap, SOFTCAP: tl.constexpr):
    """Logits from `q.k`; with a cap, `scale` is that of the tanh's argument."""
    if SOFTCAP:
        return cap * (1 - 2 / (1 + tl.exp2(products * scale)))
    return products * scale


@triton.jit
@no_type_check
def visible(rows, keys, window, WINDOW: tl.constexpr):
    """Which keys a row sees, by position."""
    seen = keys <= rows
    if WINDOW:
        seen = seen & (rows - keys < window)
    return seen


@triton.jit
@no_type_check
def tile(
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
