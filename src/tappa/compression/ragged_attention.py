"""Attention of one new token on ragged keys and values: a kernel that knows how many there are.

`ragged_attention` is what to call where `can_attend` says so; `ragged_attention_reference` says
what it computes.
"""

import importlib.util
import math
import warnings
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

BLOCK = 64  # keys of a step
LOG2_E = 1 / math.log(2)  # exp(x) is 2 to the power of x * LOG2_E


def can_attend(x: Tensor) -> bool:
    """Whether the kernel runs where this tensor is: on a GPU, with a Triton that works."""
    return x.is_cuda and importlib.util.find_spec("triton") is not None and _runs_on(x.device)


@cache
def _runs_on(device: torch.device) -> bool:
    """Tried once, on one token. One warning tells of a compiler or driver that refuses."""
    one, where = torch.ones(1, 1, device=device), torch.arange(2, device=device)
    try:
        return bool(ragged_attention(one[None], one, one, where[:1], where[1:], 1.0) == 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what compilers and drivers raise has no type in common
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        warnings.warn(
            f"a Triton kernel does not run on {device}, batches are padded instead: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def ragged_attention(
    queries: Float[Tensor, "rows heads dim"],
    keys: Float[Tensor, "tokens dim"],
    values: Float[Tensor, "tokens value_dim"],
    starts: Int[Tensor, " segments"],
    lengths: Int[Tensor, " segments"],
    scale: float,
) -> Float[Tensor, "rows heads value_dim"]:
    """`softmax(scale q K^T) V` of every query over the tokens of its segment.

    Segment `row * kv_heads + kv_head` has `lengths` tokens from `starts` on, at least one; what
    lies between segments is never read. Sums are in float32.
    """
    from tappa.compression.ragged_kernel import attend  # Triton is not there on every machine

    rows, heads, dim = queries.shape
    segments, value_dim = len(starts), values.shape[1]
    out = queries.new_empty(rows, heads, value_dim)
    group = rows * heads // segments
    widths = [max(16, 1 << (size - 1).bit_length()) for size in (group, dim, value_dim)]
    attend[(segments,)](
        *(queries.contiguous(), keys, values, out, starts, lengths, scale * LOG2_E),
        *(group, dim, value_dim, *widths, BLOCK),
        num_warps=4,
    )
    return out


def ragged_attention_reference(
    queries: Float[Tensor, "rows heads dim"],
    keys: Shaped[Tensor, "tokens dim"],
    values: Shaped[Tensor, "tokens value_dim"],
    starts: Int[Tensor, " segments"],
    lengths: Int[Tensor, " segments"],
    scale: float,
) -> Float[Tensor, "rows heads value_dim"]:
    """The same, one segment after the other, in float64: for tests."""
    rows, heads, dim = queries.shape
    grouped = queries.double().view(len(starts), -1, dim)
    out = []
    for query, start, length in zip(grouped, starts.tolist(), lengths.tolist(), strict=True):
        held = slice(start, start + length)
        weights = (scale * query @ keys[held].double().mT).softmax(-1)
        out.append(weights @ values[held].double())
    return torch.stack(out).view(rows, heads, -1).to(queries)
