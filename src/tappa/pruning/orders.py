"""Which layers go first: the table of orders."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from tappa.errors import PruningError
from tappa.pruning.importance import bi_prime
from tappa.wording import described, did_you_mean

PerLayer = Float[np.ndarray, " layers"]
Measure = Callable[[Sequence[int]], float]  # layers that are gone -> how bad the rest is


@dataclass(frozen=True)
class Known:
    """What an order may look at."""

    influence: PerLayer = field(repr=False)  # BI
    similarity: PerLayer = field(repr=False)  # S, mean over heads
    count: int  # layers to remove
    beta: float = 0.3
    seed: int = 0
    measure: Measure | None = None  # perplexity without some layers, for greedy

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return len(self.influence)


def ascending(scores: PerLayer) -> list[int]:
    """Layers by rising score, ties by lower index."""
    return [int(layer) for layer in np.argsort(scores, kind="stable")]


def bi(known: Known) -> list[int]:
    """Least block influence first (ShortGPT, arXiv 2403.03853)."""
    return ascending(known.influence)


def bi_prime_order(known: Known) -> list[int]:
    """Least norm(BI) + beta (1 - norm(S)) first (TAPPA, arXiv 2601.21709)."""
    return ascending(bi_prime(known.influence, known.similarity, known.beta))


def q_similarity(known: Known) -> list[int]:
    """Highest q-similarity first."""
    return ascending(-known.similarity)


def uniform(known: Known) -> list[int]:
    """Every k-th layer, evenly spread."""
    step = known.layers / max(known.count, 1)
    return [int((number + 0.5) * step) for number in range(known.count)]


def at_random(known: Known) -> list[int]:
    """Any layers, the same for the same seed."""
    return random.Random(known.seed).sample(range(known.layers), known.layers)


def reverse(known: Known) -> list[int]:
    """Highest BI' first: the negative control."""
    scores = bi_prime(known.influence, known.similarity, known.beta)
    return ascending(-scores)


def greedy(known: Known) -> list[int]:
    """Remove the layer whose loss raises perplexity least, measure again, repeat."""
    assert known.measure is not None
    gone: list[int] = []
    for _ in range(known.count):
        left = [layer for layer in range(known.layers) if layer not in gone]
        gone.append(min(left, key=lambda layer: known.measure([*gone, layer])))  # type: ignore[misc]
    return gone


ORDERS: dict[str, Callable[[Known], list[int]]] = {
    "bi": bi,
    "bi_prime": bi_prime_order,
    "q_similarity": q_similarity,
    "uniform": uniform,
    "random": at_random,
    "reverse": reverse,
    "greedy": greedy,
}


def layers_to_remove(name: str, known: Known) -> list[int]:
    """The first `count` layers of an order. Raises PruningError for a count that cannot be."""
    check_order(name)
    check_count(known.count, known.layers)
    return ORDERS[name](known)[: known.count]


def check_order(name: str) -> None:
    """Raises PruningError, naming the nearest order."""
    if not isinstance(name, str) or name not in ORDERS:
        came, hint = described(name), did_you_mean(str(name), ORDERS)
        raise PruningError(f"expected an order of {', '.join(ORDERS)}, got {came}{hint}")


def layer_count(wanted: int | float, layers: int) -> int:
    """Layers to remove: a whole number as it is, a share of them rounded down, but 1 at least.

    >>> layer_count(0.2, 24), layer_count(0.01, 24), layer_count(3, 24)
    (4, 1, 3)

    Raises PruningError for what is neither.
    """
    if not isinstance(wanted, float):
        check_count(wanted, layers)
        return wanted
    if not 0 < wanted < 1:
        raise PruningError(f"expected a share of layers above 0 and below 1, got {wanted!r}")
    return max(math.floor(wanted * layers + 1e-9), 1)


def check_count(count: int, layers: int) -> None:
    """Raises PruningError for a number of layers that cannot be removed."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise PruningError(
            f"expected layers to remove as a number of 0 or more, or a share as 0.2, got {count!r}"
        )
    if count >= layers:
        raise PruningError(f"cannot remove {count} of {layers} layers: at least one must stay")
