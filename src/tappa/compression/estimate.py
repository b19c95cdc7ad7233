"""What a KV cache will take, from a model's config and the length of a prompt alone."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tappa.arguments import whole_number
from tappa.cache_argument import cache_among
from tappa.checkpoint import first_line
from tappa.compression.generation import check_method
from tappa.compression.methods import Method
from tappa.errors import CompressionError
from tappa.wording import described


@dataclass(frozen=True)
class Estimate:
    """Bytes of keys and values, beside the weights. A method may hold less, and not more."""

    full_nbytes: int  # of all tokens, at the end
    held_nbytes: int  # within the budget, at the end
    peak_nbytes: int  # while the prompt is read: what is held, and one layer that is not cut yet
    layer_nbytes: int  # of the largest layer before it is cut


@dataclass(frozen=True)
class _Layer:
    heads: int  # KV heads
    nbytes: int  # of a token of one KV head
    window: int | None  # tokens that it holds at most


def estimate(
    model: PreTrainedModel | PreTrainedConfig,
    prompt_tokens: int,
    method: str | Method = "tappa",
    budget: int | float | None = None,
    *,
    new_tokens: int = 1,
    chunk: int | None = None,
    rows: int = 1,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Estimate:
    """The memory of `compressed(model, method, budget)` for a prompt and what follows.

        config = AutoConfig.from_pretrained("my-model")
        tappa.estimate(config, 100_000, "tappa", 1024, chunk=4096).peak_nbytes

    No weight is loaded. With `chunk` the prompt is read in pieces of that many tokens, as by
    `compress_context`. `dtype` is that of keys and values; by default the model's, or its config's.
    On a GPU `generate` takes buffers of its own beside this. Raises CompressionError.
    """
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise CompressionError(f"expected a model or its config, got {described(model)}")
    chosen, checked = check_method(method, budget, **options)
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rows": rows}
    counts["chunk"] = prompt_tokens if chunk is None else chunk
    for name, count in counts.items():
        whole_number(name, count, 1, CompressionError)
    kind = dtype or getattr(model, "dtype", None) or torch.float32
    layers = _layers(config, kind if isinstance(kind, torch.dtype) else torch.float32)
    plain = [layer for layer in layers if layer.window is None]
    sliding = sum(
        layer.heads * layer.nbytes * min(layer.window, prompt_tokens + new_tokens - 1)
        for layer in layers
        if layer.window is not None
    )
    if not plain:
        raise CompressionError("all layers use a sliding window: nothing to compress")
    end = prompt_tokens + new_tokens - 1  # the last token is not read
    heads = sum(layer.heads for layer in plain)
    token = max(layer.nbytes for layer in plain)
    full = sum(layer.heads * layer.nbytes for layer in plain) * end
    held, peak, largest = _reading(plain, chosen, checked, prompt_tokens, counts["chunk"])
    if new_tokens > 1:
        limit = _limit(chosen, checked, prompt_tokens, heads)
        held = heads * end if limit is None else _with_room(chosen, limit, 1, heads)
    return Estimate(
        rows * (full + sliding),
        rows * (min(held * token, full) + sliding),
        rows * (min(max(peak, held) * token, full) + sliding),
        rows * largest * token,
    )


def _limit(method: Method, budget: Any, read: int, heads: int) -> int | None:
    """Tokens that all KV heads hold together, after so many of the prompt were read."""
    if method.rule is None:
        return None
    if isinstance(budget, int):
        return budget * heads
    return max(int(budget * read * heads), method.least * heads)


def _with_room(method: Method, limit: int, new: int, heads: int) -> int:
    """Tokens at most once a few have come, for which room was made before, as far as it goes."""
    return max(limit, (method.least + new) * heads)


def _reading(
    layers: list[_Layer], method: Method, budget: Any, prompt: int, chunk: int
) -> tuple[int, int, int]:
    """Tokens of all KV heads after a prompt and at peak, and of one layer before it is cut."""
    heads = sum(layer.heads for layer in layers)
    held = peak = largest = 0
    for start in range(0, prompt, chunk):
        new = min(chunk, prompt - start)
        for layer in layers:
            held += new * layer.heads
            limit = _limit(method, budget, start + new, heads)
            largest = max(largest, min(held, (start + new) * layer.heads))
            if start and new < max(method.window, 2) and limit is not None:
                limit = _with_room(method, limit, new, heads)
                held = min(held, limit)
            peak = max(peak, held)
            held = held if limit is None else min(held, limit)
    return held, peak, largest


def _layers(config: PreTrainedConfig, dtype: torch.dtype) -> list[_Layer]:
    """What a token takes in the cache of every layer: read off a model without content."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            own = copy.deepcopy(config)  # a model keeps and changes what it is given
            model: Any = AutoModelForCausalLM.from_config(own, trust_remote_code=False).eval()
            model.config._experts_implementation = "batched_mm"  # others look at numbers
            cache = cache_among(model(torch.zeros(1, 2, dtype=torch.long), use_cache=True))
            found = [x for x in cache.layers if getattr(x, "keys", None) is not None]
            return [_described(layer, dtype) for layer in found]
        except Exception as error:  # whatever a model raises
            raise CompressionError(
                f"cannot estimate the cache of {type(config).__name__}: {first_line(error)}"
            ) from error


def _described(layer: Any, dtype: torch.dtype) -> _Layer:
    window = getattr(layer, "sliding_window", None)
    nbytes = (layer.keys.shape[-1] + layer.values.shape[-1]) * dtype.itemsize
    return _Layer(layer.keys.shape[1], nbytes, None if window is None else window - 1)
