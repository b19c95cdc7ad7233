"""Removing attention heads at two grains: single query heads, and whole KV groups.

A single query head is silenced: its columns of the output projection become 0. The checkpoint stays
a plain one of the same size, and is not faster. A KV group, a KV head with all its query heads, is
sliced out of the weights: smaller and faster, where every layer loses equally many.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tappa.errors import PruningError
from tappa.pruning.structure import (
    attention_in,
    check_plain,
    decoder_layers,
    kv_heads_of,
    layer_path,
    output_projection,
    query_heads_of,
)

Head = tuple[int, int]  # layer, query head or KV head


def silence_heads(model: PreTrainedModel, heads: Sequence[Head]) -> PreTrainedModel:
    """Set the columns of the output projection that read these query heads to 0, in place.

    Memory and speed stay as they are. Raises PruningError for a head that does not exist.
    """
    layers, count = decoder_layers(model), query_heads_of(model)
    _check(heads, len(layers), count, "query heads")
    with torch.no_grad():
        for layer, head in heads:
            weight = output_projection(attention_in(layers[layer])).weight
            width = weight.shape[1] // count
            weight[:, head * width : (head + 1) * width] = 0
    return model


def remove_kv_groups(model: PreTrainedModel, groups: Sequence[Head]) -> PreTrainedModel:
    """Slice KV heads with all their query heads out of the weights, in place.

    Raises:
        PruningError: a group that does not exist, layers that lose different numbers of groups or
            all of them, an attention whose projections are fused, or one with a norm over all
            heads, which would be another one. Nothing is altered then.
    """
    if groups:
        changes = check_kv_groups(model, groups)
        _apply(model, _sliced(model, groups), changes)
    return model


def check_kv_groups(model: PreTrainedModel, groups: Sequence[Head]) -> dict[str, int]:
    """The entries of the config of a model without these KV heads, if it would run.

    Raises PruningError, as `remove_kv_groups` does; alters nothing and copies no weight.
    """
    layers, heads, kv_heads = decoder_layers(model), query_heads_of(model), kv_heads_of(model)
    _check(groups, len(layers), kv_heads, "KV heads")
    lost = Counter(layer for layer, _ in groups)
    each = lost[groups[0][0]]
    if any(lost[layer] != each for layer in range(len(layers))):
        fewest = min(lost[layer] for layer in range(len(layers)))
        raise PruningError(
            "a plain checkpoint has equally many KV heads in all layers, but layers would lose "
            f"from {fewest} to {max(lost.values())}: remove the same number in every layer, such "
            f"as the {max(len(groups) // len(layers), 1)} least important of each (kv_groups=)"
        )
    if each == kv_heads:
        raise PruningError(f"cannot remove all {kv_heads} KV heads of a layer: one must stay")
    sliced = _sliced(model, groups, device="meta")  # refuses projections that are joined
    left = kv_heads - each
    changes = {
        "num_attention_heads": left * (heads // kv_heads),
        "num_key_value_heads": left,
        "head_dim": attention_in(layers[0]).head_dim,
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_plain(model, changes, shapes | {name: x.shape for name, x in sliced.items()})
    return changes


def _sliced(
    model: PreTrainedModel, groups: Sequence[Head], device: str | None = None
) -> dict[str, Tensor]:
    """The tensors of all attention modules without these KV heads, by name."""
    heads, kv_heads = query_heads_of(model), kv_heads_of(model)
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(decoder_layers(model)):
        kept = sorted(set(range(kv_heads)) - {g for at, g in groups if at == number})
        attention = attention_in(layer)
        name = next(n for n, m in layer.named_modules() if m is attention)
        prefix = f"{layer_path(model)}.{number}.{name}."
        for part, tensor in _slices(attention, kept, heads, kv_heads, device).items():
            found[prefix + part] = tensor
    return found


def _check(heads: Sequence[Head], layers: int, count: int, what: str) -> None:
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise PruningError(
                f"expected layers from 0 to {layers - 1} and {what} from 0 to {count - 1}, "
                f"got layer {layer}, head {head}"
            )
    if len(set(heads)) < len(heads):
        raise PruningError(f"expected each of the {what} once, got some twice")


def _slices(
    attention: nn.Module, kept: Sequence[int], heads: int, kv_heads: int, device: str | None
) -> dict[str, Tensor]:
    """The tensors of an attention module that has only some KV groups left."""
    group = heads // kv_heads
    queries = [g * group + i for g in kept for i in range(group)]
    found: dict[str, Tensor] = {}
    for name, rows, count in (
        ("q_proj", queries, heads),
        ("k_proj", kept, kv_heads),
        ("v_proj", kept, kv_heads),
    ):
        linear = getattr(attention, name, None)
        if not isinstance(linear, nn.Linear):
            raise PruningError(
                f"expected {name} as a linear layer of its own, {type(attention).__name__} has "
                "none: its KV groups cannot be sliced out (single heads can be silenced)"
            )
        for part, tensor in linear.named_parameters():
            by_head = tensor.detach().to(device).unflatten(0, (count, -1))
            found[f"{name}.{part}"] = by_head[list(rows)].flatten(0, 1).contiguous()
    out = output_projection(attention)
    out_name = next(name for name, module in attention.named_modules() if module is out)
    columns = out.weight.detach().to(device).unflatten(1, (heads, -1))[:, queries]
    found[f"{out_name}.weight"] = columns.flatten(1, 2).contiguous()
    return found


def _apply(model: PreTrainedModel, sliced: dict[str, Tensor], changes: dict[str, int]) -> None:
    for name, tensor in sliced.items():
        owner, _, part = name.rpartition(".")
        linear = model.get_submodule(owner)
        trained = getattr(linear, part).requires_grad
        setattr(linear, part, nn.Parameter(tensor, requires_grad=trained))
        if part == "weight":
            linear.out_features, linear.in_features = tensor.shape  # type: ignore[assignment]
    config = model.config.get_text_config()
    for name, value in changes.items():
        setattr(config, name, value)
    for layer in decoder_layers(model):
        attention = attention_in(layer)
        for name in ("num_heads", "num_attention_heads"):
            if hasattr(attention, name):
                setattr(attention, name, changes["num_attention_heads"])
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = changes["num_key_value_heads"]
