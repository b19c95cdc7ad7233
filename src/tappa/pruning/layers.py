"""Removing decoder layers: for good, or for as long as something is measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tappa.errors import PruningError
from tappa.head_counts import shares_keys
from tappa.pruning.structure import check_plain, decoder_layers, layer_path

OWN_ENTRIES = "per_layer_config"  # of a config: what single layers have of their own


def remove_layers(model: PreTrainedModel, removed: Sequence[int]) -> PreTrainedModel:
    """Delete decoder layers from a model, in place, so that it saves and runs as a smaller one.

    The config gets the new `num_hidden_layers` and loses the entries of per-layer lists
    (`layer_types`); attention modules are renumbered, so that caches work. Returns the model.

    Raises:
        PruningError: a layer that does not exist or comes twice, all layers, or a model whose
            config cannot describe what is left. Nothing is altered then.
    """
    kept = kept_layers(model, removed)
    changes = check_layers(model, removed)
    _apply(model, [decoder_layers(model)[i] for i in kept], changes)
    return model


def check_layers(model: PreTrainedModel, removed: Sequence[int]) -> dict[str, Any]:
    """The entries of the config of a model without these layers, if it would run.

    Raises PruningError, as `remove_layers` does, and alters nothing.
    """
    kept = kept_layers(model, removed)
    changes = _changes(model, kept)
    check_plain(model, changes, _shapes(model, kept))
    return changes


@contextmanager
def layers_removed(model: PreTrainedModel, removed: Sequence[int]) -> Iterator[PreTrainedModel]:
    """The model without some layers, inside of a `with`; afterwards it is whole again."""
    kept = kept_layers(model, removed)
    config = model.config.get_text_config()
    whole, changes = list(decoder_layers(model)), _changes(model, kept)
    before = {name: _entry(config, name) for name in changes}
    _apply(model, [whole[i] for i in kept], changes)
    try:
        yield model
    finally:
        _apply(model, whole, before)


def kept_layers(model: PreTrainedModel, removed: Sequence[int]) -> list[int]:
    """The layers that stay. Raises PruningError for what cannot be removed."""
    if removed:
        _check_apart(model)
    count = len(decoder_layers(model))
    for layer in removed:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise PruningError(f"expected layers from 0 to {count - 1}, got {layer!r}")
    if len(set(removed)) < len(removed):
        raise PruningError(f"expected each layer once, got {list(removed)}")
    if len(removed) == count:
        raise PruningError(f"cannot remove all {count} layers: at least one must stay")
    gone = set(removed)
    return [layer for layer in range(count) if layer not in gone]


def _changes(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of the config that a model with these layers has."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            changes[name] = type(value)(value[i] for i in kept)
    if getattr(config, "is_heterogeneous", False):  # some layers have entries of their own
        of_layer = {int(layer): own for layer, own in _entry(config, OWN_ENTRIES).items()}
        changes[OWN_ENTRIES] = {n: of_layer[i] for n, i in enumerate(kept) if i in of_layer}
    return changes


def _entry(config: Any, name: str) -> Any:
    """An entry of a config as it may be set."""
    return config.to_dict()[name] if name == OWN_ENTRIES else getattr(config, name)


def _check_apart(model: PreTrainedModel) -> None:
    """Raises PruningError where layers need each other in ways that renumbering breaks."""
    if shares_keys(model):
        raise PruningError(
            f"the last layers of {type(model).__name__} read the keys and values of earlier ones: "
            "no layers can be removed"
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise PruningError(
            f"{type(model).__name__} has token embeddings for each layer: no layers can be removed"
        )


def _apply(model: PreTrainedModel, layers: Sequence[nn.Module], changes: dict[str, Any]) -> None:
    parent, _, name = layer_path(model).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers))
    for name, value in changes.items():
        setattr(model.config.get_text_config(), name, value)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]


def _shapes(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, torch.Size]:
    """Name and shape of every tensor that stays, under its new name."""
    start = layer_path(model) + "."
    numbers = {old: new for new, old in enumerate(kept)}
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(start):
            number, _, rest = name.removeprefix(start).partition(".")
            if int(number) not in numbers:
                continue
            name = f"{start}{numbers[int(number)]}.{rest}"
        found[name] = tensor.shape
    return found
