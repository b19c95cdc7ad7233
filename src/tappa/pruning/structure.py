"""Where a model keeps its decoder layers, their attention, and what a plain checkpoint can hold."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tappa.checkpoint import first_line
from tappa.errors import PruningError
from tappa.head_counts import kv_heads, query_heads
from tappa.pruning.trial import obstacle

Shapes = Mapping[str, torch.Size]


def layer_path(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers, such as `model.layers`. Raises PruningError."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(_attention_in(layer) is not None for layer in module)
        ):
            return name
    raise PruningError(
        f"expected a list of {count} decoder layers with attention in each, "
        f"{type(model).__name__} has none"
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, first to last."""
    found = model.get_submodule(layer_path(model))
    assert isinstance(found, nn.ModuleList)
    return found


def attention_in(layer: nn.Module) -> Any:
    """The attention module of a decoder layer."""
    found = _attention_in(layer)
    assert found is not None
    return found


def output_projection(attention: nn.Module) -> nn.Linear:
    """The linear map from all heads' outputs to the residual stream. Raises PruningError."""
    for name in ("o_proj", "dense", "out_proj"):
        found = getattr(attention, name, None)
        if isinstance(found, nn.Linear):
            return found
    raise PruningError(
        f"expected an output projection (o_proj), {type(attention).__name__} has none"
    )


def query_heads_of(model: PreTrainedModel) -> int:
    """Query heads of a layer. Raises PruningError where layers differ."""
    return _in_all_layers(query_heads(model), "query heads")


def kv_heads_of(model: PreTrainedModel) -> int:
    """KV heads of a layer. Raises PruningError where layers differ."""
    return _in_all_layers(kv_heads(model), "KV heads")


def _in_all_layers(counts: list[int], what: str) -> int:
    if min(counts) != max(counts):
        raise PruningError(
            f"expected equally many {what} in all layers, got {min(counts)} to {max(counts)}"
        )
    return counts[0]


def edited(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a config with some entries of its text part changed. Raises PruningError."""
    try:
        twin = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(twin.get_text_config(), name, value)
        made = type(twin).from_dict(twin.to_dict())
    except Exception as error:  # whatever a config's own validation raises
        raise PruningError(
            f"{type(config).__name__} refuses {dict(changes)}: {first_line(error)}"
        ) from error
    wanted, came = (part.get_text_config().to_dict() for part in (twin, made))
    for name in changes:
        if came.get(name) != wanted.get(name):  # Gemma 4's last layer is always a full one
            raise PruningError(
                f"{type(config).__name__} makes {name} {came.get(name)}, expected {wanted[name]}"
            )
    return made


def check_plain(model: PreTrainedModel, changes: Mapping[str, Any], shapes: Shapes) -> None:
    """Whether plain transformers would build exactly these tensors of the changed config, and run.

    Raises PruningError, before anything of the model is altered, where it would not.
    """
    config = edited(model.config, changes)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model's constructor raises
        raise PruningError(
            f"transformers cannot build {type(model).__name__} with {dict(changes)}: "
            f"{first_line(error)}"
        ) from error
    wanted = {name: tensor.shape for name, tensor in built.state_dict().items()}
    wrong = sorted(
        name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)
    )
    if wrong:
        name = wrong[0]
        raise PruningError(
            f"a plain checkpoint of {type(model).__name__} cannot hold this: {name} would be "
            f"{_shape(wanted, name)}, the pruned one is {_shape(shapes, name)}"
        )
    if failure := obstacle(config, model.config):
        reason = f"with {dict(changes)} does not run: {first_line(failure)}"
        raise PruningError(f"a plain {type(model).__name__} {reason}") from failure


def _shape(shapes: Shapes, name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"


def _attention_in(layer: nn.Module) -> nn.Module | None:
    found = (m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim"))
    neox = (m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_size"))
    return next(found, next(neox, None))
