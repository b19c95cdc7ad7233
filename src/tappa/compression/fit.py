"""Which keys reach the attention: whether a model uses its cache as compression assumes.

Tokens are scored by the queries that attend to them. So the keys and values of an attention call
must be those that `update` of one layer has returned, as they are or expanded token by token.
Anything else is refused in the first forward pass, before a token is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tappa.errors import CompressionError

KeysAndValues = tuple[Tensor, Tensor]  # (rows, KV heads, tokens, dim) each
LOOKED_AT = 8  # tokens by which an expansion is checked


@dataclass(frozen=True)
class Expansion:
    """How the keys and values of an attention call follow from those in the cache, by token.

    Latents of multi-head latent attention (arXiv 2405.04434) become the keys of all heads; other
    models repeat heads in an order of their own.
    """

    heads: tuple[int, ...]  # for each KV head of the attention, the one of the cache
    expand: Callable[[Tensor, Tensor], KeysAndValues]

    def mean(self, x: Float[Tensor, "heads *rest"]) -> Float[Tensor, "kv_heads *rest"]:
        """Mean over the attention's KV heads that come from each of the cache."""
        return torch.stack([x[where].mean(0) for where in self._served()])

    def mean_of(self, numbers: Sequence[float]) -> list[float]:
        """`mean` of one number for each KV head of the attention."""
        return [sum(numbers[i] for i in at) / len(at) for at in self._served()]

    def _served(self) -> list[list[int]]:
        kv_heads = max(self.heads) + 1
        return [[i for i, at in enumerate(self.heads) if at == head] for head in range(kv_heads)]


def expansion_of(module: nn.Module, cached: KeysAndValues, came: KeysAndValues) -> Expansion | None:
    """How what came to an attention follows from what is cached; None: it is the same.

    Raises CompressionError where that is not seen.
    """
    if all(torch.equal(one, other) for one, other in zip(cached, came, strict=True)):
        return None
    kv_heads, heads = cached[0].shape[1], came[0].shape[1]
    if heads % kv_heads == 0:
        in_turn = tuple(n % kv_heads for n in range(heads))
        in_runs = tuple(n * kv_heads // heads for n in range(heads))
        for order in (in_turn, in_runs):
            repeat = _Repeat(order)
            if all(torch.equal(*pair) for pair in zip(repeat(*cached), came, strict=True)):
                return Expansion(order, repeat)
    expand = getattr(module, "expand_kv", None)  # of latents, as transformers' models name it
    if expand is not None and kv_heads == 1:
        made = expand(*(x[:, :, :LOOKED_AT] for x in cached))
        if all(_close(one, x[:, :, :LOOKED_AT]) for one, x in zip(made, came, strict=True)):
            return Expansion((0,) * heads, expand)
    raise CompressionError(
        f"{type(module).__name__} attends to other keys or values than its cache returned, "
        f"{tuple(came[0].shape)} for {tuple(cached[0].shape)}: it cannot be compressed"
    )


@dataclass(frozen=True)
class _Repeat:
    """Each head of the attention is one of the cache."""

    order: tuple[int, ...]

    def __call__(self, keys: Tensor, values: Tensor) -> KeysAndValues:
        return keys[:, list(self.order)], values[:, list(self.order)]


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of sums."""
    if one.shape != other.shape:
        return False
    tolerance = 4 * torch.finfo(one.dtype).eps ** 0.75 * float(other.abs().max())
    return bool(((one - other).abs() <= tolerance).all())


def check_mask(mask: Tensor | None) -> None:
    """Raise CompressionError for a mask that differs from head to head, made out of the tokens."""
    if mask is not None and mask.shape[1] != 1:
        raise CompressionError("expected one mask for all heads, the model makes several")


def check_expansion(module: nn.Module, implementation: str, ranks: int) -> None:
    """Raise CompressionError where keys that are expanded after the cache cannot be compressed."""
    name = type(module).__name__
    if implementation.startswith("flash"):
        raise CompressionError(
            f"{name} expands what it caches, which is compressed with attention by sdpa or eager, "
            f"not {implementation}"
        )
    if ranks > 1:
        raise CompressionError(
            f"{name} expands what it caches: it cannot be compressed where heads are split over "
            "processes"
        )
