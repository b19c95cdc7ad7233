"""How many heads the layers of a model have, by its config."""

from typing import Any, TypeVar

from transformers import PreTrainedModel

T = TypeVar("T")


def layer_configs(model: PreTrainedModel) -> list[Any]:
    """The config of every layer: that of the model, where layers have none of their own."""
    config = model.config.get_text_config()
    own = getattr(config, "per_layer_config", None)  # transformers 5.18 and later
    return [config] * config.num_hidden_layers if own is None else list(own)


def query_heads(model: PreTrainedModel) -> list[int]:
    """Query heads of every layer."""
    return [int(config.num_attention_heads) for config in layer_configs(model)]


def kv_heads(model: PreTrainedModel) -> list[int]:
    """KV heads of every layer; a layer that reads another's keys has as many as that one."""
    return [
        int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        for config in layer_configs(model)
    ]


def one_or_all(values: list[T]) -> T | list[T]:
    """What all layers have, or the list where they differ."""
    return values[0] if values.count(values[0]) == len(values) else values


def shares_keys(model: PreTrainedModel) -> bool:
    """Whether the last layers read the keys and values of earlier ones."""
    return bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))
