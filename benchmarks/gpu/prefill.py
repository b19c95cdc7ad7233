"""Prefill on a GPU: time and peak memory with a compressed cache against the full one.

`--kvpress` adds kvpress's SnapKVPress, which is to leave as many tokens, where kvpress is installed
(0.5.5 wants transformers below 5.3).
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from llama import gpu, kernels, llama, milliseconds, peak_gb, spread
from transformers import DynamicCache, PreTrainedModel

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache

BUDGET = 1024


def readers(model: PreTrainedModel, kvpress: bool) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Ways to read a prompt, each into a new cache."""
    run: Any = model

    def full(ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        run(ids, **with_cache(run, cache), logits_to_keep=1)
        return cache

    def compressed(ids: torch.Tensor) -> CompressedCache:
        cache = tappa.compressed(model, "tappa", BUDGET)
        run(ids, **with_cache(run, cache), logits_to_keep=1)
        return cache

    def by_press(ids: torch.Tensor) -> DynamicCache:
        from kvpress import SnapKVPress

        with SnapKVPress(compression_ratio=1 - BUDGET / ids.shape[1], window_size=32)(model):
            return full(ids)

    ways = {"full": full, "tappa": compressed}
    return ways | {"kvpress_snapkv": by_press} if kvpress else ways


def measure(model: PreTrainedModel, tokens: int, runs: int, kvpress: bool) -> dict[str, Any]:
    """Each way in turns, and its ratio to the full cache right before."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    ways = readers(model, kvpress)
    result: dict[str, Any] = {"benchmark": "prefill", "tokens": tokens, "budget": BUDGET}
    for name, read in ways.items():
        result[f"{name}_peak_gb"] = peak_gb(lambda read=read: read(ids))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, read in ways.items():
            times[name].append(milliseconds(lambda read=read: read(ids)))
    for name, taken in times.items():
        result[f"{name}_ms"] = spread(taken)
        pairs = zip(taken, times["full"], strict=True)
        result[f"{name}_over_full"] = spread([mine / other for mine, other in pairs])
    cache = ways["tappa"](ids)
    layer = cache.compressed_layers[0].storage()
    one = layer.token_nbytes * layer.kv_heads
    bound = one * (BUDGET * len(cache.layers) + tokens)
    result["kv_peak_over_budget_and_a_layer"] = round(cache.peak_nbytes / bound, 4)
    result["kv_held_gb"] = round(cache.nbytes / 1e9, 3)
    if kvpress:
        result["kvpress_tokens_held"] = ways["kvpress_snapkv"](ids).layers[0].keys.shape[2]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--runs", type=int, nargs="+", default=[7, 3])
    parser.add_argument("--kvpress", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    model = llama()
    with torch.inference_mode():
        for tokens, runs in zip(asked.tokens, asked.runs, strict=True):
            print(json.dumps(measure(model, tokens, runs, asked.kvpress) | gpu()), flush=True)
        if asked.profile:
            ids = torch.randint(0, 1000, (1, asked.tokens[0]), device="cuda")
            for name, read in readers(model, asked.kvpress).items():
                print(name, *kernels(lambda read=read: read(ids), 28), sep="\n", flush=True)


if __name__ == "__main__":
    main()
