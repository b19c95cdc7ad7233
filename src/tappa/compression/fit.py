"""Which keys reach the attention: whether a model uses its cache as compression assumes.

Tokens are scored by the queries that attend to them. So it must be known that the keys and values
of an attention call are those that `update` of one layer has returned, as they are or expanded
token by token. Anything else is refused in the first forward pass, before a token is written.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

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


@dataclass
class Arrival:
    """What an attention call has got: keys and values of a layer of the cache."""

    layer: int  # of the cache
    first: bool  # no attention had them before; False: a later layer shares them
    expansion: Expansion | None = None


class KeyFlow:
    """Of one forward pass: what the cache has returned, and which attention got it."""

    def __init__(self) -> None:
        self._returned: dict[int, tuple[Any, Any]] = {}  # of each layer, as weak references
        self._readers: dict[int, nn.Module] = {}  # that got it first
        self._pending: tuple[int, KeysAndValues] | None = None  # what no attention has got yet

    @torch.compiler.disable
    def returned(self, layer: int, pair: KeysAndValues) -> None:
        """The cache has returned the keys and values of a layer, for the only time in a pass."""
        if layer in self._returned:
            raise CompressionError(
                f"the model writes layer {layer} of its cache twice in one forward pass: "
                "it cannot be compressed"
            )
        keys, values = pair
        self._returned[layer] = weakref.ref(keys), weakref.ref(values)
        self._pending = layer, pair

    def arrived(self, module: nn.Module, key: Tensor, value: Tensor) -> Arrival | None:
        """Whose keys and values an attention call has got; None if no layer of the cache's.

        Raises CompressionError where they belong to a layer but are others.
        """
        name = type(module).__name__
        pending, self._pending = self._pending, None
        layer = pending[0] if pending and _same(pending[1][0], key) else self._layer_with(key)
        if layer is None:
            if pending is None:
                return None
            layer, pair = pending
            self._readers[layer] = module
            return Arrival(layer, True, expansion_of(module, pair, (key, value)))
        values = pending[1][1] if pending and layer == pending[0] else self._returned[layer][1]()
        if not _same(values, value):
            raise CompressionError(
                f"{name} attends to other values than its cache returned: it cannot be compressed"
            )
        first = layer not in self._readers
        if not first and self._readers[layer] is module:
            raise CompressionError(
                f"{name} attends more than once to the same keys: its cache cannot be compressed"
            )
        self._readers.setdefault(layer, module)
        return Arrival(layer, first)

    def unread(self) -> list[int]:
        """Layers whose keys and values no attention call has got."""
        return [layer for layer in self._returned if layer not in self._readers]

    def forget(self) -> None:
        """The forward pass is over."""
        self._returned.clear()
        self._readers.clear()
        self._pending = None

    def _layer_with(self, key: Tensor) -> int | None:
        return next((n for n, known in self._returned.items() if _same(known[0](), key)), None)


def _same(known: Tensor | None, came: Tensor) -> bool:
    """Whether a tensor is one that lives, or a view of all of it."""
    if known is None or known is came:
        return known is came
    return (
        known.shape == came.shape
        and known.stride() == came.stride()
        and known.device == came.device
        and known.data_ptr() == came.data_ptr()
    )


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


def rereads_after(model: PreTrainedModel) -> int | None:
    """Tokens after which the model's own `generate` drops the cache and reads all of them again.

    Phi's longrope turns every key by other frequencies in texts that are longer. None: never.
    """
    plain = GenerationMixin.prepare_inputs_for_generation
    own = getattr(type(model), "prepare_inputs_for_generation", plain)
    border = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    return border if own is not plain and isinstance(border, int) else None


def crosses_border(model: PreTrainedModel, held: int, end: int) -> bool:
    """Whether a text of `held` tokens, all read, is read again before it has `end` tokens."""
    border = rereads_after(model)
    return border is not None and 0 < held <= border < end


def check_border(model: PreTrainedModel, held: int, end: int) -> None:
    """Raise CompressionError if a text of `held` tokens in a cache cannot grow to `end` tokens."""
    if crosses_border(model, held, end):
        raise CompressionError(
            f"{type(model).__name__} reads all tokens again, with other RoPE frequencies, when a "
            f"text grows past {rereads_after(model)}: {held} in the cache cannot become {end} step "
            "by step; model.generate does it"
        )
