"""Linear layers of a few vectors, at the speed at which their weights are read.

Every program takes some outputs and goes along their weights, which are read once, whatever the
number of vectors; sums are in float32. Weights rest, so that a program may ask for the first of
them while the kernel that makes its vectors still runs (programmatic dependent launch).
"""

from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from tappa.kernels.launching import choose, constexpr, jit, power_of_two, tl

MOST = 2  # vectors; with more of them cuBLAS is faster on an H100
TYPES = (torch.float16, torch.bfloat16)


class FewVectors(TorchFunctionMode):
    """While it is on, linear layers send few vectors through their 16-bit weights by a kernel.

    No module is touched: `torch.nn.functional.linear` itself is intercepted, and only for weights
    that are parameters; those that a layer makes as it runs, of quantized numbers say, may not rest
    yet. Gradients do not pass.
    """

    @no_type_check  # a check would be intercepted too
    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch for all that it does."""
        if func is linear and not kwargs and _taken(*args[:2]):
            x, weight, bias = args if len(args) == 3 else (*args, None)
            return gemv(x, weight, bias)
        return func(*args, **(kwargs or {}))


def _taken(x: Tensor, weight: Tensor) -> bool:
    vectors = x.numel() // max(x.shape[-1], 1)
    fits = x.dtype == weight.dtype and weight.dtype in TYPES and weight.stride(-1) == 1
    return fits and 1 <= vectors <= MOST and type(weight) is nn.Parameter  # no subclass of it


# an operator, so that torch.compile leaves it as it is
@torch.library.custom_op("tappa::gemv", mutates_args=())
def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for at most `MOST` vectors (..., inputs); nothing writes `weight`."""
    rows = x.reshape(-1, x.shape[-1])
    out = choose(
        "gemv",
        x,
        lambda: gemv_triton(rows, weight, bias),
        lambda: gemv_reference(rows, weight, bias),
    )
    return out.view(*x.shape[:-1], len(weight))


@gemv.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def gemv_reference(
    x: Float[Tensor, "vectors inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "vectors outputs"]:
    """As `linear` does it, which may be intercepted."""
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


class Tiles(NamedTuple):
    """Of a program: outputs, inputs of a block, and warps."""

    outputs: int
    inputs: int
    warps: int


FASTEST = {1: Tiles(1, 2048, 4), 2: Tiles(2, 1024, 4)}  # by number of vectors, on an H100


def gemv_triton(
    x: Float[Tensor, "vectors inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    tiles: Tiles | None = None,
    early: bool | None = None,
) -> Float[Tensor, "vectors outputs"]:
    """One pass over the weights. `early`: by dependent launch, from Hopper on by default."""
    (vectors, inputs), outputs = x.shape, len(weight)
    tiles = tiles or FASTEST[power_of_two(vectors, 1)]
    if early is None:
        early = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    out = torch.empty(vectors, outputs, dtype=x.dtype, device=x.device)
    _gemv[(-(-outputs // tiles.outputs),)](
        *(x.contiguous(), weight, out if bias is None else bias, out),
        *(vectors, outputs, inputs, weight.stride(0)),
        VECTORS=power_of_two(vectors, 1),
        OUTPUTS=tiles.outputs,
        INPUTS=min(tiles.inputs, power_of_two(inputs)),
        BIASED=bias is not None,
        EARLY=early,
        num_warps=tiles.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@jit
@no_type_check
def _gemv(
    x, weight, bias, out, vectors, outputs, inputs, stride,
    VECTORS: constexpr, OUTPUTS: constexpr, INPUTS: constexpr, BIASED: constexpr, EARLY: constexpr,
):  # fmt: skip
    """The next block of weights is under way while one is worked on."""
    vector = tl.arange(0, VECTORS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)[None, None, :]
    line = weight + output.to(tl.int64)[None, :, None] * stride + column
    there, known = (output < outputs)[None, :, None], (vector < vectors)[:, None, None]
    inside = there & (column < inputs)
    coming = tl.load(line, mask=inside, other=0.0, eviction_policy="evict_first")
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    given = x + vector[:, None, None] * inputs + column
    total = tl.zeros((VECTORS, OUTPUTS, INPUTS), tl.float32)
    for begin in range(0, inputs, INPUTS):
        part, left = coming, inputs - begin
        inside = there & (column + INPUTS < left)
        coming = tl.load(
            line + begin + INPUTS, mask=inside, other=0.0, eviction_policy="evict_first"
        )
        value = tl.load(given + begin, mask=known & (column < left), other=0.0)
        total += part.to(tl.float32) * value.to(tl.float32)
    done = tl.sum(total, 2)
    if BIASED:
        done += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = vector[:, None] * outputs + output[None, :]
    inside = (vector < vectors)[:, None] & (output < outputs)[None, :]
    tl.store(out + place, done.to(out.dtype.element_ty), mask=inside)
