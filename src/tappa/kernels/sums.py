"""What the similarity kernel gives, for readers that have no Triton."""

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True)
class VectorSums:
    """Sums over the steps of one chunk, for every head."""

    post: Float64[Tensor, "heads dim"]  # unit vectors after RoPE
    pre: Float64[Tensor, "heads dim"]  # unit vectors before RoPE
    vectors: Float64[Tensor, "heads dim"]  # vectors before RoPE
    norms: Float64[Tensor, "heads pairs"]  # lengths in each channel
    adjacent_post: Float64[Tensor, " heads"]  # cosines of neighbouring steps
    adjacent_pre: Float64[Tensor, " heads"]
    squares: Float64[Tensor, " heads"]  # squared lengths of unit vectors: 1, or 0 for zeros
