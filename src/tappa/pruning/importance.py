"""How important layers and heads are: formulas over a Calibration, nothing else."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from tappa.errors import PruningError
from tappa.pruning.calibration import Calibration

PerLayer = Float[np.ndarray, " layers"]
PerHead = Float[np.ndarray, "layers heads"]
HeadImportance = Literal["dissimilarity", "output", "mix"]


def normalised(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """`(x - min x) / (max x - min x)`; 0 where all are the same."""
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else np.zeros_like(x)


def bi_prime(influence: PerLayer, similarity: PerLayer, beta: float) -> PerLayer:
    """`norm(BI) + beta (1 - norm(S))`: layers with low values go first.

    BI is the block influence, S the mean q-similarity of each layer's heads, norm min-max.
    Source: TAPPA (arXiv 2601.21709), structured pruning.

    >>> bi_prime(np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.6, 0.2]), 0.5)
    array([0.5, 0.5, 1.5])
    """
    if not 0 <= beta < float("inf"):
        raise PruningError(f"expected a finite beta >= 0, got {beta!r}")
    return normalised(influence) + beta * (1 - normalised(similarity))


def head_importance(
    calibration: Calibration, kind: HeadImportance = "output", share: float = 0.5
) -> PerHead:
    """Importance of every query head: those with low values go first.

    - `dissimilarity`: `1 - S`, S the head's q-similarity
    - `output`: mean norm of what the head adds to the residual stream, in shares of that stream
    - `mix`: `(1 - share) norm(1 - S) + share norm(output)`, norm min-max over the whole model
    """
    apart, output = 1 - calibration.q_similarity, calibration.head_output
    if kind == "dissimilarity":
        return apart
    if kind == "output":
        return output
    if kind != "mix":
        raise PruningError(f"expected the importance dissimilarity, output or mix, got {kind!r}")
    if not 0 <= share <= 1:
        raise PruningError(f"expected a share from 0 to 1, got {share!r}")
    return (1 - share) * normalised(apart) + share * normalised(output)


def group_importance(heads: PerHead, kv_heads: int) -> Float[np.ndarray, "layers kv_heads"]:
    """Mean over the query heads of each KV head."""
    return heads.reshape(len(heads), kv_heads, -1).mean(2)
