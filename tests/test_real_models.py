"""The default model on the packaged text: what is known of it must come out."""

import os

import pytest
import torch
from transformers import DynamicCache

import tappa
from tappa.cache_argument import with_cache
from tappa.models import LoadedModel
from tappa.patterns import LABELS, spearman
from tappa.texts import encode_texts, packaged_text

pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def analysis(smollm2: LoadedModel) -> tappa.Analysis:
    return tappa.analyze(smollm2.model, smollm2.tokenizer, packaged_text(), tokens=256)


def test_every_head_of_smollm2(analysis: tappa.Analysis) -> None:
    places = [(h["layer"], h["head"]) for h in analysis.heads]
    assert places == [(layer, head) for layer in range(30) for head in range(9)]
    assert analysis.prompts == [256]
    assert (analysis.model["name"], analysis.model["kv_heads"]) == ("SmolLM2-135M-Instruct", 3)
    assert {h["observed"] for h in analysis.heads} <= set(LABELS)
    assert {h["kv_head"] for h in analysis.heads} == {0, 1, 2}


def test_no_bound_is_violated(analysis: tappa.Analysis) -> None:
    summary = analysis.summary()
    assert summary["bound_violations"] == 0
    assert summary["bounds_checked"] > 100_000


def test_a_sink_is_found(analysis: tappa.Analysis) -> None:
    head = next(h for h in analysis.heads if (h["layer"], h["head"]) == (18, 8))
    assert head["sink_mass"] > 0.9
    assert head["observed"] == "re-access"


def test_expected_and_real_persistence_rank_heads_alike(analysis: tappa.Analysis) -> None:
    rank = spearman(analysis.to_frame(), "expected_diagonal", "diagonal")
    assert rank is not None
    assert rank > 0.6
    assert rank == analysis.summary()["agreement"]["spearman_expected_diagonal"]


# further models, which `make test` does not fetch: TAPPA_TEST_MODELS=a.gguf:b make test
OTHERS = [name for name in os.environ.get("TAPPA_TEST_MODELS", "").split(os.pathsep) if name]


MORE = "needs more real models: TAPPA_TEST_MODELS=a.gguf:b make test"


@pytest.mark.skipif(not OTHERS, reason=MORE)
@pytest.mark.parametrize("name", OTHERS or [""])
def test_another_model(name: str) -> None:
    """Every head, no violation, capture changes no bit, and a cache that holds its budget."""
    model, tokenizer = tappa.load(name, device="cpu")
    ids = torch.tensor(encode_texts(tokenizer, [packaged_text()], 256))
    with torch.inference_mode():
        before = model(ids, **with_cache(model, DynamicCache())).logits
    analysis = tappa.analyze(model, tokenizer, packaged_text(), tokens=256)
    config = model.config.get_text_config()
    assert len(analysis.heads) == config.num_hidden_layers * config.num_attention_heads
    assert analysis.summary()["bound_violations"] == 0
    rank = spearman(analysis.to_frame(), "expected_diagonal", "diagonal")
    assert rank is not None
    assert rank > 0.6
    with torch.inference_mode():
        whole = tappa.compressed(model, "tappa", 256)
        assert torch.equal(model(ids, **with_cache(model, whole)).logits, before)
        cache = tappa.compressed(model, "tappa", 64)
        model(ids, **with_cache(model, cache))
    assert 0.98 * 64 < cache.tokens_held() <= 64
