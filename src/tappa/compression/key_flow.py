"""From the cache to attention: which call gets the keys and values that a layer has returned."""

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils

from tappa.compression.fit import KeysAndValues, expansion_of
from tappa.compression.layer import CompressedLayer
from tappa.errors import CompressionError

# in the place of layers that have no keys of their own, where transformers has such a class
NO_LAYERS = {kind for kind in [getattr(cache_utils, "DummyLayer", None)] if kind is not None}


class KeyFlow:
    """Of one forward pass: what the cache has returned, and which attention got it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._config = model, model.config.get_text_config()
        self._returned: dict[int, tuple[Any, Any]] = {}  # of each layer, as weak references
        self._readers: dict[int, nn.Module] = {}  # that got it first
        self._pending: tuple[int, KeysAndValues] | None = None  # what no attention has got yet

    @torch.compiler.disable
    def returned(self, layer: int, pair: KeysAndValues) -> None:
        """The cache has returned the keys and values of a layer, for the only time in a pass."""
        if layer in self._returned:
            self._refuse(f"writes layer {layer} of its cache twice in one forward pass")
        keys, values = pair
        self._returned[layer] = weakref.ref(keys), weakref.ref(values)
        self._pending = layer, pair

    def layer_of(
        self, layers: Sequence[Any], module: nn.Module, key: Tensor, value: Tensor
    ) -> tuple[CompressedLayer | None, bool]:
        """The compressed layer whose keys an attention call has got, and whether it is the first.

        None for a sliding window, and for attention without a cache such as that of an encoder.
        Later calls are those of layers that share its keys. CompressionError where keys or values
        are others than those returned.
        """
        source = self._source(key)
        if source is None:
            self._check_unknown(layers, module)
            return None, True
        number, pair, as_returned = source
        layer, first = layers[number], number not in self._readers
        if as_returned and not _same(pair[1], value):
            self._refuse("attends to other values than its cache returned")
        if self._readers.get(number) is module:
            self._refuse("attends more than once to the same keys")
        self._readers.setdefault(number, module)
        if not isinstance(layer, CompressedLayer):
            return None, True
        if first and not as_returned and layer.expansion is None:
            layer.expansion = expansion_of(module, pair, (key, value))
        if not first or layer.expansion is not None or module.layer_idx != number:
            layer.plain = False
        return layer, first

    def check_all_read(self, layers: Sequence[Any], seen: int) -> None:
        """After a forward pass: CompressionError if a layer was not written, or not read.

        `seen` is the number of tokens that each of them should have got by now.
        """
        wrong = [
            str(number)
            for number, layer in enumerate(layers)
            if isinstance(layer, CompressedLayer)
            and (number not in self._readers or layer.seen != seen)
        ]
        if wrong:
            which = f"layers {', '.join(wrong)} of {len(layers)}"
            self._refuse(f"does not attend to its cache layer by layer ({which})")

    def forget(self) -> None:
        """The forward pass is over."""
        self._returned.clear()
        self._readers.clear()
        self._pending = None

    def _source(self, key: Tensor) -> tuple[int, tuple[Tensor, Any], bool] | None:
        """Layer, what it has returned, and whether the key is that; else what nobody has got."""
        pending, self._pending = self._pending, None
        if pending is not None and _same(pending[1][0], key):
            return *pending, True
        for number, (keys, values) in self._returned.items():
            if _same(keys(), key):
                return number, (key, values()), True
        return None if pending is None else (*pending, False)

    def _check_unknown(self, layers: Sequence[Any], module: nn.Module) -> None:
        """Refuse attention to keys that the cache has not returned, where it should have."""
        number = getattr(module, "layer_idx", None)
        if number is None or getattr(module, "config", None) is not self._config:
            return
        layer = layers[number] if number < len(layers) else None
        if layer is None or isinstance(layer, CompressedLayer) or type(layer) in NO_LAYERS:
            self._refuse(f"attends in layer {number} to keys that did not come from its cache")

    def _refuse(self, what: str) -> NoReturn:
        raise CompressionError(f"{type(self._model).__name__} {what}: it cannot be compressed")


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
