"""What a model calls its KV cache: `cache` from transformers 5.24 on, `past_key_values` before."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import GenerationMixin

NAMES = ("cache", "past_key_values")  # the newest first; a model takes one of them


def cache_name(model: nn.Module) -> str:
    """The argument of `forward` and `generate` that takes the KV cache.

    Asked of the model, since models that bring code of their own may stay with the old name.
    """
    forward: Any = getattr(model.forward, "__func__", model.forward)
    return _first_name(forward) or _first_name(GenerationMixin.prepare_inputs_for_generation) or ""


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of this model.

    model(ids, **with_cache(model, cache))
    """
    return {cache_name(model): cache}


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or in a model's output; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def rename_cache(model: nn.Module, arguments: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The keyword arguments with this cache under the model's own name for it."""
    others = {name: value for name, value in arguments.items() if name not in NAMES}
    return others | with_cache(model, cache)


@lru_cache(maxsize=1024)
def _first_name(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)
