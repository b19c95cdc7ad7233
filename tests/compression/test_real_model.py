"""Compression of the default model on the packaged text."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tappa
from tappa.cache_argument import with_cache
from tappa.models import LoadedModel
from tappa.texts import encode_texts, packaged_text

pytestmark = pytest.mark.xdist_group("smollm2")
BYTES = 2 * 4 * 64  # a key and a value of 64 float32 numbers
SEGMENTS = 30 * 3  # layers, KV heads
NAMES = ("tappa", "streaming_llm")


@pytest.fixture(scope="module")
def ids(smollm2: LoadedModel) -> Tensor:
    """509 tokens of prose."""
    return torch.tensor(encode_texts(smollm2.tokenizer, [packaged_text()], 509))


@pytest.mark.same_kernel
@torch.inference_mode()
def test_a_budget_for_all_gives_the_same_logits(smollm2: LoadedModel, ids: Tensor) -> None:
    cache, full = tappa.compressed(smollm2.model, "tappa", 509), DynamicCache()
    for piece in (ids[:, :499], ids[:, 499:500], ids[:, 500:]):
        expected = smollm2.model(piece, **with_cache(smollm2.model, full)).logits
        assert torch.equal(
            smollm2.model(piece, **with_cache(smollm2.model, cache)).logits, expected
        )


@torch.inference_mode()
@pytest.mark.parametrize("method", ["tappa", "snapkv", "cake", "h2o", "expected_attention"])
def test_memory_is_the_budget(smollm2: LoadedModel, ids: Tensor, method: str) -> None:
    cache = tappa.compressed(smollm2.model, method, 101)
    smollm2.model(ids, **with_cache(smollm2.model, cache), logits_to_keep=1)
    budget = 101 * SEGMENTS * BYTES
    assert 0.98 * budget <= cache.nbytes <= budget
    assert cache.peak_nbytes <= budget + 3 * 509 * BYTES  # and one layer's full keys and values
    assert cache.full_nbytes == 509 * SEGMENTS * BYTES


@torch.inference_mode()
def test_tappa_loses_less_than_the_most_recent_tokens(smollm2: LoadedModel, ids: Tensor) -> None:
    """KL to the full cache on the next 13 tokens, at a quarter of the prompt."""
    recording = tappa.record(smollm2.model, ids[:, :496])

    def after(method: str) -> Tensor:
        cache = recording.compress(method, [124])[0]
        cache.frozen = True
        logits = smollm2.model(ids[:, 496:], **with_cache(smollm2.model, cache)).logits
        return logits[0].log_softmax(-1)

    full = after("full")
    lost = {name: float((full.exp() * (full - after(name))).sum(-1).mean()) for name in NAMES}
    assert 0 < lost["tappa"] < lost["streaming_llm"]
