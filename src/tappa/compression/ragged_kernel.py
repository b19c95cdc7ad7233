"""The kernel of `ragged_attention`, in Triton."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q_at, k_at, v_at, out_at, start_at, length_at, scale,
    group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program for each segment: its group of queries over its keys, `N` at a time."""
    segment = tl.program_id(0).to(tl.int64)
    start, length = tl.load(start_at + segment).to(tl.int64), tl.load(length_at + segment)
    g, d, v, n = tl.arange(0, G), tl.arange(0, D), tl.arange(0, V), tl.arange(0, N)
    q_there = (g[:, None] < group) & (d[None, :] < dim)
    q_offset = (segment * group + g[:, None]) * dim + d[None, :]
    query = tl.load(q_at + q_offset, mask=q_there, other=0.0)
    top = tl.full([G], float("-inf"), tl.float32)  # largest logit so far, in powers of 2
    total = tl.zeros([G], tl.float32)
    mean = tl.zeros([G, V], tl.float32)
    for first in range(0, length, N):
        at = start + first + n
        held = first + n < length
        k_there = held[None, :] & (d[:, None] < dim)
        key = tl.load(k_at + at[None, :] * dim + d[:, None], mask=k_there, other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * scale
        logits = tl.where(held[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        v_there = held[:, None] & (v[None, :] < value_dim)
        value = tl.load(v_at + at[:, None] * value_dim + v[None, :], mask=v_there, other=0.0)
        mean = mean * shrink[:, None]
        mean += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    out_there = (g[:, None] < group) & (v[None, :] < value_dim)
    out_offset = (segment * group + g[:, None]) * value_dim + v[None, :]
    tl.store(out_at + out_offset, mean / total[:, None], mask=out_there)
