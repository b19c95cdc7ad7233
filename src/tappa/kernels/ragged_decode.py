"""One step of attention over segments of different lengths, which writes the new token first.

Buffers are flat and of a fixed size; a segment (one KV head of one row) begins at `starts` and
holds `lengths` tokens, both on the device, so that a captured graph sees them change. There is room
for one more token behind every segment.
"""

from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa.kernels.launching import choose, constexpr, jit, power_of_two, tl

TOKENS = 64  # of a block
PROGRAMS = 4  # for each multiprocessor, at most


def ragged_decode(
    queries: Float[Tensor, "segments group dim"],
    new_keys: Float[Tensor, "segments dim"],
    new_values: Float[Tensor, "segments value_dim"],
    keys: Float[Tensor, "slots dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Int[Tensor, " segments"],
    lengths: Int[Tensor, " segments"],
    longest: int,
    scale: float,
    softcap: float | None = None,
    kept: Float[Tensor, "segments group dim"] | None = None,
) -> Float[Tensor, "segments group value_dim"]:
    """Write the new token behind each segment, then `softmax(scale q.k) v` over all its tokens.

    `lengths` do not count the new token and stay as they are. `longest`, about the largest of them,
    guides how the work is split, and no more. In place: `keys`, `values`, and `kept`, which gets a
    copy of the queries.
    """
    tensors = (queries, new_keys, new_values, keys, values, starts, lengths)
    return choose(
        "ragged_decode",
        queries,
        lambda: ragged_decode_triton(*tensors, longest, scale, softcap, kept),
        lambda: ragged_decode_reference(*tensors, longest, scale, softcap, kept),
    )


def ragged_decode_reference(
    queries: Float[Tensor, "segments group dim"],
    new_keys: Float[Tensor, "segments dim"],
    new_values: Float[Tensor, "segments value_dim"],
    keys: Float[Tensor, "slots dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Int[Tensor, " segments"],
    lengths: Int[Tensor, " segments"],
    longest: int,
    scale: float,
    softcap: float | None = None,
    kept: Float[Tensor, "segments group dim"] | None = None,
) -> Float[Tensor, "segments group value_dim"]:
    """The formula, on a padded copy."""
    at, longest = starts + lengths, int(lengths.max())
    if kept is not None:
        kept.copy_(queries)
    keys.index_copy_(0, at, new_keys)
    values.index_copy_(0, at, new_values)
    offset = torch.arange(longest + 1, device=keys.device)
    there = offset <= lengths[:, None]
    index = torch.where(there, starts[:, None] + offset, at[:, None])
    logits = scale * torch.matmul(queries.float(), keys[index].float().mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~there[:, None], -torch.inf).softmax(-1)
    return torch.matmul(weights, values[index].float()).to(queries)


def ragged_decode_triton(
    queries: Float[Tensor, "segments group dim"],
    new_keys: Float[Tensor, "segments dim"],
    new_values: Float[Tensor, "segments value_dim"],
    keys: Float[Tensor, "slots dim"],
    values: Float[Tensor, "slots value_dim"],
    starts: Int[Tensor, " segments"],
    lengths: Int[Tensor, " segments"],
    longest: int,
    scale: float,
    softcap: float | None = None,
    kept: Float[Tensor, "segments group dim"] | None = None,
) -> Float[Tensor, "segments group value_dim"]:
    """Split over the tokens of a segment, then merged by their log-sum-exps."""
    segments, group, dim = queries.shape
    value_dim = values.shape[1]
    splits = splits_of(segments, longest, queries.device)
    out = queries.new_empty(segments, group, value_dim)
    parts = queries.new_empty(splits, segments, group, value_dim, dtype=torch.float32)
    logs = parts.new_empty(splits, segments, group)
    tensors = queries, new_keys, new_values, keys, values
    _attend[(segments, splits)](
        *(x.contiguous() for x in tensors),
        *(starts, lengths, out if kept is None else kept, out, parts, logs, scale, softcap or 1.0),
        *(segments, group, dim, value_dim),
        SPLITS=splits,
        GROUP=power_of_two(group),
        DIM=power_of_two(dim),
        VALUE_DIM=power_of_two(value_dim),
        TOKENS=TOKENS,
        CAPPED=softcap is not None,
        KEPT=kept is not None,
    )
    if splits > 1:
        _merge[(segments * group,)](
            *(parts, logs, out, segments * group, value_dim),
            SPLITS=splits,
            ROWS=power_of_two(splits, 1),
            VALUE_DIM=power_of_two(value_dim),
        )
    return out


def splits_of(segments: int, longest: int, device: torch.device) -> int:
    """Into how many programs the tokens of a segment are divided."""
    if device.type != "cuda":
        return min(3, -(-(longest + 1) // TOKENS))
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(PROGRAMS * cores // segments, -(-longest // (2 * TOKENS))))


@jit
@no_type_check
def _attend(
    queries, new_keys, new_values, keys, values, starts, lengths, kept, out, parts, logs,
    scale, cap, segments, group, dim, value_dim,
    SPLITS: constexpr, GROUP: constexpr, DIM: constexpr, VALUE_DIM: constexpr,
    TOKENS: constexpr, CAPPED: constexpr, KEPT: constexpr,
):  # fmt: skip
    """Attention of one segment's queries on one part of its tokens; the first has the new one."""
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = tl.load(starts + segment).to(tl.int64)
    length = tl.load(lengths + segment)
    row = tl.arange(0, GROUP)
    column = tl.arange(0, DIM)
    value_column = tl.arange(0, VALUE_DIM)
    there = row < group
    place = (segment * group + row)[:, None] * dim + column
    query = tl.load(queries + place, mask=there[:, None] & (column < dim), other=0.0)
    highest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    sums = tl.zeros((GROUP, VALUE_DIM), tl.float32)
    if split == 0:
        if KEPT:
            tl.store(kept + place, query, mask=there[:, None] & (column < dim))
        new_key = tl.load(new_keys + segment * dim + column, mask=column < dim, other=0.0)
        new_value = tl.load(
            new_values + segment * value_dim + value_column,
            mask=value_column < value_dim,
            other=0.0,
        )
        slot = start + length
        tl.store(keys + slot * dim + column, new_key, mask=column < dim)
        tl.store(values + slot * value_dim + value_column, new_value, mask=value_column < value_dim)
        logit = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        if CAPPED:
            logit = cap * (2 / (1 + tl.exp(-2 * logit / cap)) - 1)
        highest = logit
        total += 1.0
        sums += new_value.to(tl.float32)[None, :]
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    first = split * chunk
    for begin in range(first, tl.minimum(first + chunk, length), TOKENS):
        token = begin + tl.arange(0, TOKENS)
        here = token < length
        slots = (start + token)[:, None]
        key = tl.load(keys + slots * dim + column, mask=here[:, None] & (column < dim), other=0.0)
        value = tl.load(
            values + slots * value_dim + value_column,
            mask=here[:, None] & (value_column < value_dim), other=0.0,
        )  # fmt: skip
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            logits = cap * (2 / (1 + tl.exp(-2 * logits / cap)) - 1)
        logits = tl.where(here[None, :], logits, float("-inf"))
        peak = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - peak[:, None])
        keep = tl.exp(highest - peak)
        total = total * keep + tl.sum(weights, 1)
        sums = sums * keep[:, None]
        sums += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = peak
    sums = sums / tl.maximum(total, 1e-37)[:, None]
    line = segment * group + row
    inside = there[:, None] & (value_column < value_dim)
    if SPLITS == 1:
        place = line[:, None] * value_dim + value_column
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
    else:
        line += split * segments * group
        tl.store(parts + line[:, None] * value_dim + value_column, sums, mask=inside)
        log = tl.where(total > 0, highest + tl.log(tl.maximum(total, 1e-37)), float("-inf"))
        tl.store(logs + line, log, mask=there)


@jit
@no_type_check
def _merge(
    parts, logs, out, lines, value_dim,
    SPLITS: constexpr, ROWS: constexpr, VALUE_DIM: constexpr,
):  # fmt: skip
    """The mean of the parts of one query head, weighted by their sums of exponentials."""
    line = tl.program_id(0)
    split = tl.arange(0, ROWS)
    column = tl.arange(0, VALUE_DIM)
    log = tl.load(logs + split * lines + line, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp(log - tl.max(log, 0))
    place = (split.to(tl.int64) * lines + line)[:, None] * value_dim + column
    inside = (split < SPLITS)[:, None] & (column < value_dim)
    part = tl.load(parts + place, mask=inside, other=0.0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(
        out + line * value_dim + column, mixed.to(out.dtype.element_ty), mask=column < value_dim
    )
