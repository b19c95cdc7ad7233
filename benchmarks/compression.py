"""Compression on SmolLM2: prefill time, decoding time and bytes held, against the full cache."""

import json
from typing import Any

import torch
from machine import describe, ratios
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tappa
from tappa.cache_argument import with_cache
from tappa.texts import encode_texts, packaged_text

RUNS = 5
STEPS = 500


def read(model: PreTrainedModel, ids: Tensor, cache: Any) -> Any:
    """Prefill: all tokens of a prompt into a cache."""
    model(ids, **with_cache(model, cache), logits_to_keep=1)
    return cache


def write(model: PreTrainedModel, cache: Any) -> None:
    """Decode: the same made-up tokens, one by one."""
    for step in range(STEPS):
        model(torch.tensor([[100 + step]]), **with_cache(model, cache))


def main() -> None:
    model, tokenizer = tappa.load(device="cpu")
    prompt, longer = (
        torch.tensor(encode_texts(tokenizer, [packaged_text()], n)) for n in (2048, 4096)
    )
    what = {"benchmark": "compression", "model": "SmolLM2-135M-Instruct float32"}
    result: dict[str, Any] = {}

    def full() -> DynamicCache:
        return DynamicCache(config=model.config)

    with torch.inference_mode():
        for method in ("tappa", "snapkv"):
            result[f"prefill_2048_{method}_512_against_full"] = ratios(
                lambda m=method: read(model, prompt, tappa.compressed(model, m, 512)),
                lambda: read(model, prompt, full()),
                RUNS,
            )
        started, small = read(model, longer, full()), tappa.compressed(model, "tappa", 256)
        read(model, longer, small)
        wanted = sum(
            256 * layer.storage().kv_heads * layer.storage().token_nbytes
            for layer in small.compressed_layers
        )

        def restart() -> DynamicCache:
            """The prompt of 4096 tokens again."""
            again = full()
            for index, layer in enumerate(started.layers):
                again.update(layer.keys, layer.values, index)
            return again

        result["decode_500_after_4096_full_against_tappa_256"] = ratios(
            lambda: write(model, restart()), lambda: write(model, small.copy()), 3
        )
        result["bytes_held_over_budget"] = round(small.nbytes / wanted, 4)
    print(json.dumps(what | result | describe()))


if __name__ == "__main__":
    main()
