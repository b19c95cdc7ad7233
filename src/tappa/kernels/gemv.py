"""A few vectors through the weights of a linear layer, at the speed at which weights are read.

Every program takes some outputs and goes along their weights; sums are in float32. The weights are
read once, whatever the number of vectors.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from tappa.kernels.launching import constexpr, jit, power_of_two, tl

MOST = 4  # vectors


@dataclass(frozen=True)
class Tiles:
    """Outputs of a program, inputs of a block, warps, and blocks that are under way at once."""

    outputs: int = 4
    inputs: int = 1024
    warps: int = 4
    stages: int = 1


def gemv_triton(
    x: Float[Tensor, "vectors inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    tiles: Tiles | None = None,
) -> Float[Tensor, "vectors outputs"]:
    """`x @ weight.T + bias` for at most `MOST` vectors."""
    tiles = tiles or Tiles()
    (vectors, inputs), outputs = x.shape, len(weight)
    out = torch.empty(vectors, outputs, dtype=x.dtype, device=x.device)
    _gemv[(-(-outputs // tiles.outputs),)](
        *(x.contiguous(), weight, out if bias is None else bias, out),
        *(vectors, outputs, inputs, weight.stride(0)),
        VECTORS=power_of_two(vectors, 1),
        OUTPUTS=tiles.outputs,
        INPUTS=tiles.inputs,
        STAGES=tiles.stages,
        WHOLE=inputs % tiles.inputs == 0,
        BIASED=bias is not None,
        num_warps=tiles.warps,
    )
    return out


@jit
@no_type_check
def _gemv(
    x, weight, bias, out, vectors, outputs, inputs, stride,
    VECTORS: constexpr, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr,
    WHOLE: constexpr, BIASED: constexpr,
):  # fmt: skip
    vector = tl.arange(0, VECTORS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)[None, None, :]
    line = weight + output.to(tl.int64)[None, :, None] * stride + column
    given = x + vector[:, None, None] * inputs + column
    there, known = (output < outputs)[None, :, None], (vector < vectors)[:, None, None]
    total = tl.zeros((VECTORS, OUTPUTS, INPUTS), tl.float32)
    for begin in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        if WHOLE:
            part = tl.load(line + begin, mask=there, other=0.0, eviction_policy="evict_first")
            value = tl.load(given + begin, mask=known, other=0.0)
        else:
            inside = column < inputs - begin
            part = tl.load(
                line + begin, mask=there & inside, other=0.0, eviction_policy="evict_first"
            )
            value = tl.load(given + begin, mask=known & inside, other=0.0)
        total += part.to(tl.float32) * value.to(tl.float32)
    done = tl.sum(total, 2)
    if BIASED:
        done += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = vector[:, None] * outputs + output[None, :]
    inside = (vector < vectors)[:, None] & (output < outputs)[None, :]
    tl.store(out + place, done.to(out.dtype.element_ty), mask=inside)
