"""Changing a model's RoPE channels for as long as something is measured; then it is as before."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tappa.errors import VerificationError
from tappa.head_counts import kv_heads as kv_heads_of_layers
from tappa.head_counts import query_heads
from tappa.rope import RotaryChannels


@contextmanager
def channels_swapped(
    model: PreTrainedModel,
    layer: int,
    kv_heads: Sequence[int],
    rotary: RotaryChannels,
    a: int,
    b: int,
) -> Iterator[None]:
    """RoPE channels a and b of some KV heads, and of all query heads that read them, swapped.

    The rows of the query and key projections (weights, biases, norms) that make the two pairs of
    dimensions change places, so that what channel a held turns with the frequency of b. Logits at
    lag 0 stay as they are. Afterwards the weights are bit for bit what they were.

    Raises:
        VerificationError: a channel that does not exist, projections that are fused in a way that
            is not known, or norms shared by all heads while only some are to be swapped.
    """
    pairs = len(rotary.theta)
    if not (0 <= a < pairs and 0 <= b < pairs) or a == b:
        raise VerificationError(
            f"expected two different channels from 0 to {pairs - 1}, got {a} and {b}"
        )
    order = torch.arange(rotary.dim)
    for dims in (rotary.first.cpu(), rotary.second.cpu()):
        order[dims[a]], order[dims[b]] = dims[b], dims[a]
    tensors = list(_rows(model, layer, kv_heads, rotary.dim))
    before = [tensor.clone() for tensor, _ in tensors]
    try:
        with torch.no_grad():
            for tensor, starts in tensors:
                old = tensor.clone()
                for start in starts:
                    tensor[start : start + rotary.dim] = old[start + order.to(old.device)]
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), old in zip(tensors, before, strict=True):
                tensor.copy_(old)


@contextmanager
def base_changed(model: PreTrainedModel, factor: float) -> Iterator[float]:
    """The RoPE base c times a factor: `theta_m = (c factor)^(-2m/d)`. Gives the new base.

    Raises VerificationError for a scaled RoPE (linear, llama3, ...), whose frequencies do not
    follow from a base alone, and for a factor that leaves no base above 1.
    """
    base = plain_base(model)
    if not math.isfinite(factor) or base * factor <= 1:
        raise VerificationError(f"expected a factor that leaves a base above 1, got {factor!r}")
    buffers = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            power = math.log(base * factor) / math.log(base)
            buffer.copy_(buffer.double() ** power)
        yield base * factor
    finally:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)


def plain_base(model: PreTrainedModel) -> float:
    """The base c of a RoPE that is not scaled. Raises VerificationError for another."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if found.get("rope_type") != "default" or "rope_theta" not in found:
        kind = found.get("rope_type") or "several of them"
        raise VerificationError(f"expected a RoPE that is not scaled (default), got {kind}")
    return float(found["rope_theta"])


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of a layer. Raises VerificationError."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer and (
            hasattr(module, "head_dim") or hasattr(module, "head_size")
        ):
            return module
    raise VerificationError(f"expected a layer with attention, layer {layer} has none")


def _rows(
    model: PreTrainedModel, layer: int, kv_heads: Sequence[int], dim: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Every tensor whose rows make queries or keys, and where those of the heads start."""
    heads, all_kv = query_heads(model)[layer], kv_heads_of_layers(model)[layer]
    group = heads // all_kv
    queries = [h * dim for g in kv_heads for h in range(g * group, (g + 1) * group)]
    keys = [g * dim for g in kv_heads]
    module: Any = attention_module(model, layer)
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj")):
        parts = [(module.q_proj, queries), (module.k_proj, keys)]
    elif isinstance(getattr(module, "qkv_proj", None), nn.Linear):
        parts = [(module.qkv_proj, [*queries, *(heads * dim + start for start in keys)])]
    else:
        raise VerificationError(
            f"expected q_proj and k_proj (or qkv_proj), layer {layer} ({type(module).__name__}) "
            "has neither"
        )
    for linear, starts in parts:
        for tensor in linear.parameters():
            yield tensor.data, starts
    for name, starts, count in (("q_norm", queries, heads), ("k_norm", keys, all_kv)):
        norm = getattr(module, name, None)
        for tensor in norm.parameters() if isinstance(norm, nn.Module) else ():
            if tensor.numel() == count * dim:
                yield tensor.data, starts
            elif tensor.numel() == dim and len(kv_heads) == all_kv:
                yield tensor.data, [0]
            else:
                raise VerificationError(
                    f"{name} of {type(module).__name__} is shared by all heads of a layer: swap "
                    "the channels of all of them"
                )


def must_swap_all(model: PreTrainedModel, layer: int, dim: int) -> bool:
    """Whether norms that all heads share allow swapping in all heads of a layer only."""
    module = attention_module(model, layer)
    norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    tensors = [t for norm in norms if isinstance(norm, nn.Module) for t in norm.parameters()]
    return any(tensor.numel() == dim for tensor in tensors)
