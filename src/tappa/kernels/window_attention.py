"""What the last queries of a prompt attend to, summed up for every token and KV head.

A query sees the tokens of its KV head at its own position and before; tokens lie in segments of a
flat buffer, one for each KV head, and a negative position is padding. With attention `w` (softmax
of `scale * q.k`) of W queries and a group of G query heads for each KV head:

- `mean` of a token is `w` averaged over queries and group,
- `variance` is the sample variance of `w` over the queries (0 for W = 1), averaged over the group,
- `entropy` of a KV head is `-sum w log w` over the group, its queries and their earlier tokens:
  those before the first of the queries. Sources: SnapKV (arXiv 2404.14469), CAKE (2503.12491).
"""

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa.kernels.launching import constexpr, jit, power_of_two, tl

CHUNK = 1024  # tokens of a program of the first pass
TOKENS = 64  # of a block


class WindowSums(NamedTuple):
    """Padded with 0 where segments differ in length."""

    mean: Float[Tensor, "kv_heads longest"]
    variance: Float[Tensor, "kv_heads longest"]
    entropy: Float[Tensor, " kv_heads"]


@dataclass(frozen=True)
class Segments:
    """Where the tokens of each KV head lie in flat buffers."""

    keys: Float[Tensor, "slots dim"]
    positions: Int[Tensor, " slots"]
    starts: Int[Tensor, " kv_heads"]
    lengths: Int[Tensor, " kv_heads"]
    longest: int  # no less than any length


def window_sums_reference(
    held: Segments,
    queries: Float[Tensor, "kv_heads group window dim"],
    at: Int[Tensor, " window"],
    scale: float,
    softcap: float | None = None,
) -> WindowSums:
    """The formulas, one KV head at a time."""
    kv_heads, _, window, _ = queries.shape
    mean = queries.new_zeros(kv_heads, held.longest, dtype=torch.float32)
    variance, entropy = torch.zeros_like(mean), mean.new_zeros(kv_heads)
    for head, (start, length) in enumerate(
        zip(held.starts.tolist(), held.lengths.tolist(), strict=True)
    ):
        keys = held.keys[start : start + length].float()
        positions = held.positions[start : start + length]
        logits = scale * queries[head].float() @ keys.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = (positions > at[:, None]) | (positions < 0)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        mean[head, :length] = weights.mean((0, 1))
        if window > 1:
            variance[head, :length] = weights.var(1).mean(0)
        entropy[head] = torch.special.entr(weights[..., positions < at.min()]).sum()
    return WindowSums(mean, variance, entropy)


def window_sums_triton(
    held: Segments,
    queries: Float[Tensor, "kv_heads group window dim"],
    at: Int[Tensor, " window"],
    scale: float,
    softcap: float | None = None,
) -> WindowSums:
    """Two passes over the keys: the log-sum-exp of every query, then the sums."""
    kv_heads, group, window, dim = queries.shape
    queries, at = queries.contiguous(), at.to(torch.int32)
    chunks, blocks = -(-held.longest // CHUNK), -(-held.longest // TOKENS)
    parts = queries.new_empty(kv_heads, group, window, chunks, dtype=torch.float32)
    where = held.keys, held.positions, held.starts, held.lengths, queries, at
    sizes = {"WINDOW": power_of_two(window), "DIM": power_of_two(dim), "TOKENS": TOKENS}
    capped = {"cap": softcap or 1.0, "CAPPED": softcap is not None}
    numbers = {"scale": scale, "group": group, "window": window, "dim": dim}
    _log_sums[(kv_heads * group, chunks)](
        *where, parts, **numbers, chunks=chunks, CHUNK=CHUNK, **sizes, **capped
    )
    mean = parts.new_zeros(kv_heads, held.longest)
    variance, entropy = torch.zeros_like(mean), parts.new_zeros(kv_heads, blocks)
    _token_sums[(kv_heads, blocks)](
        *(*where, parts.logsumexp(-1), at.amin(), mean, variance, entropy),
        *(held.longest, blocks),
        **numbers,
        **sizes,
        **capped,
    )
    return WindowSums(mean, variance, entropy.sum(1))


@jit
@no_type_check
def _logits(
    keys, positions, start, length, token, query, at, scale, cap, dim,
    DIM: constexpr, CAPPED: constexpr,
):  # fmt: skip
    """Logits of a block of tokens (-inf: not seen), and the tokens' positions."""
    column = tl.arange(0, DIM)
    here = token < length
    inside = here[:, None] & (column < dim)
    key = tl.load(keys + (start + token)[:, None] * dim + column, mask=inside, other=0.0)
    position = tl.load(positions + start + token, mask=here, other=0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if CAPPED:
        logits = cap * (2 / (1 + tl.exp(-2 * logits / cap)) - 1)
    seen = here & (position >= 0) & (position <= at[:, None])
    return tl.where(seen, logits, float("-inf")), position


@jit
@no_type_check
def _log_sums(
    keys, positions, starts, lengths, queries, at, parts,
    scale, group, window, dim, chunks, cap,
    CHUNK: constexpr, WINDOW: constexpr, DIM: constexpr, TOKENS: constexpr,
    CAPPED: constexpr,
):  # fmt: skip
    """Log-sum-exp of the logits of one query head in one chunk of tokens."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    start = tl.load(starts + head // group)
    length = tl.load(lengths + head // group)
    row = tl.arange(0, WINDOW)
    column = tl.arange(0, DIM)
    there = row < window
    place = (head * window + row)[:, None] * dim + column
    query = tl.load(queries + place, mask=there[:, None] & (column < dim), other=0.0)
    position = tl.load(at + row, mask=there, other=0)
    highest = tl.full((WINDOW,), float("-inf"), tl.float32)
    total = tl.zeros((WINDOW,), tl.float32)
    first = chunk * CHUNK
    for begin in range(first, tl.minimum(first + CHUNK, length), TOKENS):
        logits, _ = _logits(
            keys, positions, start, length, begin + tl.arange(0, TOKENS), query, position,
            scale, cap, dim, DIM, CAPPED,
        )  # fmt: skip
        peak = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        highest = peak
    log = tl.where(total > 0, highest + tl.log(tl.maximum(total, 1e-37)), float("-inf"))
    tl.store(parts + (head * window + row) * chunks + chunk, log, mask=there)


@jit
@no_type_check
def _token_sums(
    keys, positions, starts, lengths, queries, at, logs, earliest, mean, variance, entropy,
    longest, blocks, scale, group, window, dim, cap,
    WINDOW: constexpr, DIM: constexpr, TOKENS: constexpr, CAPPED: constexpr,
):  # fmt: skip
    """Mean and variance of the attention on a block of tokens of one KV head; its entropy."""
    segment = tl.program_id(0)
    block = tl.program_id(1)
    start = tl.load(starts + segment)
    length = tl.load(lengths + segment)
    if block * TOKENS < length:
        token = block * TOKENS + tl.arange(0, TOKENS)
        row = tl.arange(0, WINDOW)
        column = tl.arange(0, DIM)
        there = row < window
        position = tl.load(at + row, mask=there, other=-1)
        bound = tl.load(earliest)
        means = tl.zeros((TOKENS,), tl.float32)
        spreads = tl.zeros((TOKENS,), tl.float32)
        entropies = 0.0
        for member in range(group):
            line = (segment * group + member) * window + row
            place = line[:, None] * dim + column
            query = tl.load(queries + place, mask=there[:, None] & (column < dim), other=0.0)
            log = tl.load(logs + line, mask=there, other=0.0)
            logits, held = _logits(
                keys, positions, start, length, token, query, position,
                scale, cap, dim, DIM, CAPPED,
            )  # fmt: skip
            seen = (logits > float("-inf")) & there[:, None]
            surprise = tl.where(seen, log[:, None] - logits, 0.0)
            weights = tl.where(seen, tl.exp(-surprise), 0.0)
            center = tl.sum(weights, 0) / window
            rest = tl.where(there[:, None], weights - center[None, :], 0.0)
            means += center
            spreads += tl.sum(rest * rest, 0)
            entropies += tl.sum(tl.where(held < bound, tl.sum(weights * surprise, 0), 0.0))
        here = token < length
        tl.store(mean + segment * longest + token, means / group, mask=here)
        share = group * tl.maximum(window - 1, 1)
        tl.store(variance + segment * longest + token, spreads / share, mask=here)
        tl.store(entropy + segment * blocks + block, entropies)
