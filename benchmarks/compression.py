"""Compression on SmolLM2: prefill time, decoding time and bytes held, against the full cache."""

import json
from typing import Any

import torch
from machine import describe, ratios
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tappa
from tappa.texts import encode_texts, packaged_text

RUNS = 5
METHODS = ("tappa", "snapkv", "cake")
STEPS = 500


def read(model: PreTrainedModel, ids: Tensor, cache: Any) -> Any:
    """Prefill: all tokens of a prompt into a cache."""
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def write(model: PreTrainedModel, cache: Any) -> None:
    """Decode: the same made-up tokens, one by one."""
    for step in range(STEPS):
        model(torch.tensor([[100 + step]]), past_key_values=cache)


def main() -> None:
    model, tokenizer = tappa.load(device="cpu")
    prompt, longer = (
        torch.tensor(encode_texts(tokenizer, [packaged_text()], n)) for n in (2048, 4096)
    )
    what = {"benchmark": "compression", "model": "SmolLM2-135M-Instruct float32"}
    result: dict[str, Any] = {"prefill_2048_budget_512": {}, "decode_500_after_4096_budget_256": {}}

    def full() -> DynamicCache:
        return DynamicCache(config=model.config)

    with torch.inference_mode():
        for method in METHODS:
            result["prefill_2048_budget_512"][method] = ratios(
                lambda m=method: read(model, prompt, tappa.compressed(model, m, 512)),
                lambda: read(model, prompt, full()),
                RUNS,
            )
        started = read(model, longer, full())
        for method in METHODS:
            small = read(model, longer, tappa.compressed(model, method, 256))

            def restart() -> DynamicCache:
                """The prompt of 4096 tokens again: keys and values are not copied here."""
                again = full()
                for index, layer in enumerate(started.layers):
                    again.update(layer.keys[:, :, :4096], layer.values[:, :, :4096], index)
                return again

            result["decode_500_after_4096_budget_256"][method] = ratios(
                lambda: write(model, restart()), lambda c=small: write(model, c.copy()), 3
            )
            wanted = 256 * sum(
                2 * layer.storage().kv_heads * layer.storage().keys[0].nbytes
                for layer in small.compressed_layers
            )
            result["decode_500_after_4096_budget_256"][method]["bytes_held_over_budget"] = round(
                small.nbytes / wanted, 4
            )
    print(json.dumps(what | result | describe()))


if __name__ == "__main__":
    main()
