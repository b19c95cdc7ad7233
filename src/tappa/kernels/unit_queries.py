"""Sums of unit queries before RoPE, in one pass over the queries: what q-similarity needs.

A kernel beside the one of `similarity`, since a compressed prompt has what that one excludes:
padding and any positions, dimensions that RoPE leaves out, any strides; and it needs two sums, not
nine, and no keys.
"""

from typing import no_type_check

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import normalize

from tappa.kernels.launching import choose, constexpr, jit, power_of_two, tl
from tappa.rope import RotaryChannels

TOKENS, HEADS = 64, 4  # of a block
Table = tuple[Float[Tensor, "tokens pairs"], Float[Tensor, "tokens pairs"]]


def unit_query_sums(
    queries: Float[Tensor, "heads tokens dim"],
    table: Table,
    rotary: RotaryChannels,
) -> tuple[Float64[Tensor, "heads dim"], Float64[Tensor, " heads"]]:
    """`sum_t u_t` and `sum_t |u_t|^2` of `u_t = R_(p_t)^-1 q_t / |q_t|` for every head.

    Queries come after RoPE, in any floating type and with any strides; `table` is
    `rotary.table(positions)`. Sums are in float32 over
    blocks of tokens, in float64 over blocks. A zero vector counts as zero.
    """
    return choose(
        "unit_query_sums",
        queries,
        lambda: unit_query_sums_triton(queries, table, rotary),
        lambda: unit_query_sums_reference(queries, table, rotary),
    )


def unit_query_sums_reference(
    queries: Float[Tensor, "heads tokens dim"],
    table: Table,
    rotary: RotaryChannels,
) -> tuple[Float64[Tensor, "heads dim"], Float64[Tensor, " heads"]]:
    """The formula, with copies of the queries."""
    unit = normalize(rotary.turn_back(queries.float(), *table), dim=-1)
    parts = torch.stack([part.sum(-2) for part in unit.split(128, dim=-2)])  # quicker on a CPU
    squares = torch.linalg.vecdot(unit, unit).sum(-1, dtype=torch.float64)
    return parts.sum(0, dtype=torch.float64), squares


def unit_query_sums_triton(
    queries: Float[Tensor, "heads tokens dim"],
    table: Table,
    rotary: RotaryChannels,
) -> tuple[Float64[Tensor, "heads dim"], Float64[Tensor, " heads"]]:
    """One pass over the queries. Every program sums a block of tokens of some heads."""
    heads, tokens, dim = queries.shape
    cos, sin = table
    pairs, rest = len(rotary.first), len(rotary.unrotated)
    blocks = -(-tokens // TOKENS)
    one, other, step = rotary.evenly or (0, 0, 0)
    sums = queries.new_empty(blocks, heads, dim, dtype=torch.float32)
    squares = queries.new_empty(blocks, heads, dtype=torch.float32)
    _sum_units[(blocks, -(-heads // HEADS))](
        *(queries, cos, sin, rotary.first, rotary.second, rotary.unrotated, sums, squares),
        *queries.stride(),
        *(heads, tokens, dim, pairs, rest, one, other, step),
        TOKENS=TOKENS,
        HEADS=HEADS,
        PAIRS=power_of_two(max(pairs, 1)),
        REST=power_of_two(rest) if rest else 0,
        EVENLY=rotary.evenly is not None,
    )
    return sums.sum(0, dtype=torch.float64), squares.sum(0, dtype=torch.float64)


@jit
@no_type_check
def _sum_units(
    queries, cos, sin, first, second, unrotated, sums, squares,
    head_stride, token_stride, dim_stride, heads, tokens, dim, pairs, rest, begin, behind, step,
    TOKENS: constexpr, HEADS: constexpr, PAIRS: constexpr, REST: constexpr, EVENLY: constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAIRS)
    here = token < tokens
    there = pair < pairs
    turn = token[:, None] * pairs + pair
    c = tl.load(cos + turn, mask=here[:, None] & there, other=0.0)
    s = tl.load(sin + turn, mask=here[:, None] & there, other=0.0)
    if EVENLY:  # so that the compiler sees neighbours in memory
        one = begin + pair * step
        other = behind + pair * step
    else:
        one = tl.load(first + pair, mask=there, other=0)
        other = tl.load(second + pair, mask=there, other=0)
    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        row = queries + head * head_stride + token[:, None] * token_stride
        inside = here[:, None] & there
        a = tl.load(row + one * dim_stride, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(row + other * dim_stride, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(a * a + b * b, 1)
        out = sums + (block * heads + head) * dim
        if REST > 0:
            third = tl.arange(0, REST)
            left = tl.load(unrotated + third, mask=third < rest, other=0)
            inside = here[:, None] & (third < rest)
            x = tl.load(row + left * dim_stride, mask=inside, other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1)
        length = tl.maximum(tl.sqrt(square), 1e-12)
        a /= length[:, None]
        b /= length[:, None]
        tl.store(out + one, tl.sum(a * c + b * s, 0), mask=there)
        tl.store(out + other, tl.sum(b * c - a * s, 0), mask=there)
        if REST > 0:
            tl.store(out + left, tl.sum(x / length[:, None], 0), mask=third < rest)
        tl.store(squares + block * heads + head, tl.sum(square / (length * length)))
