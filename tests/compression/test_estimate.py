"""The memory that is expected, against what caches measure."""

from typing import Any

import pytest
import torch

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, write_on
from tappa.compression.reading import read_in_pieces
from tappa.errors import CompressionError
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Any = make_tiny
KV = 80  # bytes of a token of one KV head: keys and values of 10 numbers, 4 bytes each
HEADS = 3  # of each layer


def test_by_hand() -> None:
    """53 tokens and 7 new ones, the last of which is not read, in 2 layers."""
    model = tiny_model("llama")
    found = tappa.estimate(model, 53, "streaming_llm", 11, new_tokens=7, window=3, sinks=2)
    assert found.full_nbytes == 59 * 2 * HEADS * KV
    assert found.held_nbytes == 11 * 2 * HEADS * KV
    assert found.layer_nbytes == 53 * HEADS * KV
    assert found.peak_nbytes == (2 * 11 + 53) * HEADS * KV  # the budget and one layer
    pieces = tappa.estimate(model, 53, "streaming_llm", 11, chunk=17, window=3, sinks=2)
    assert pieces.full_nbytes == 53 * 2 * HEADS * KV
    assert pieces.peak_nbytes == (2 * 11 + 17) * HEADS * KV
    full = tappa.estimate(model.config, 53, "full", chunk=17, rows=5, dtype=torch.bfloat16)
    assert full.full_nbytes == full.held_nbytes == full.peak_nbytes == 5 * 53 * HEADS * KV
    share = tappa.estimate(model, 50, "streaming_llm", 0.2, window=3, sinks=2)
    assert share.held_nbytes == 10 * 2 * HEADS * KV


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("chunk", [None, 7, 17, 27])
@pytest.mark.parametrize("budget", [8, 20, 200, 0.5])  # divisible by the layers before the last
def test_it_is_what_a_uniform_budget_takes(
    layers: int, chunk: int | None, budget: int | float
) -> None:
    model = tiny_model("llama", num_hidden_layers=layers)
    ids = torch.arange(106).remainder(101)[None, :53]
    context = tappa.compress_context(
        *(model, ids, "streaming_llm", budget), chunk=chunk, window=1, sinks=2
    )
    found = tappa.estimate(model, 53, "streaming_llm", budget, chunk=chunk, window=1, sinks=2)
    assert found.full_nbytes == context._cache.full_nbytes
    if budget == 0.5:  # a share is rounded down for each head, layer by layer
        assert 0 <= found.held_nbytes - context.nbytes < layers * HEADS * KV
        assert 0 <= found.peak_nbytes - context.peak_nbytes < 2 * layers * HEADS * KV
    else:
        assert found.held_nbytes == context.nbytes
        assert found.peak_nbytes == context.peak_nbytes


@pytest.mark.parametrize("method", ["full", "tappa", "pyramidkv", "cake", "expected_attention"])
@pytest.mark.parametrize("chunk", [None, 37, 17])
def test_no_method_takes_more(method: str, chunk: int | None) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    text = "It is a truth universally acknowledged, that a single man wants a wife."  # 71 tokens
    budget = None if method == "full" else 35
    cache = tappa.compressed(model, method, budget)
    written = write_on(cache, tiny_tokenizer(), text, 13, chunk=chunk)
    new = written.tokens_seen - 70
    found = tappa.estimate(model, written.prompt_tokens, method, budget, new_tokens=13, chunk=chunk)
    assert written.prompt_tokens == len(text)
    if written.new_tokens == 13:
        assert new + 70 == written.prompt_tokens + 12
    assert written.nbytes <= found.held_nbytes
    assert written.peak_nbytes <= found.peak_nbytes
    assert written.full_nbytes <= found.full_nbytes


def test_sliding_windows_hold_what_they_see() -> None:
    model = tiny_model("gemma3")
    ids = torch.arange(3, 34)[None]
    for tokens in (31, 4):
        cache = tappa.compressed(model, "full")
        with torch.inference_mode():
            model(ids[:, :tokens], **with_cache(model, cache))
        found = tappa.estimate(model, tokens, "full")
        assert found.full_nbytes == found.held_nbytes == cache.nbytes
    with pytest.raises(CompressionError, match="all layers use a sliding window"):
        tappa.estimate(tiny_model("mistral"), 31, "full")


def test_pieces_of_a_prompt_are_read_once() -> None:
    """With the full cache, the text is the same however it is read."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    seen = []

    def noted(module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append(ids.shape[1])

    handle = model.register_forward_pre_hook(noted, with_kwargs=True)
    write_on(tappa.compressed(model, "full"), tokenizer, "a" * 53, 1, chunk=17)
    assert seen == [17, 17, 17, 2]
    seen.clear()
    write_on(tappa.compressed(model, "full"), tokenizer, "a" * 51, 1, chunk=17)
    assert seen == [17, 17, 17]
    handle.remove()
    cache: CompressedCache = tappa.compressed(model, "full")
    read_in_pieces(cache, torch.arange(3, 34)[None], 7)
    assert (cache.tokens_seen, cache.history.length) == (31, 31)
