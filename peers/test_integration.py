"""kvpress's scores in tappa's cache, tappa's budgets in kvpress's pipeline."""

import gc
import importlib
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from captured import positions_of
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    pipeline,
)

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, Method, budgets
from tappa.compression.methods import METHODS
from tappa.compression.scorers import window_mean
from tappa.errors import CompressionError
from tappa.integrations.kvpress import TappaPress, scorer_of
from tiny import save_tiny, tiny_model

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 4
# no token twice: the first layer's keys of equal tokens have equal norms, up to rounding
PROMPT = 3 + torch.randperm(208, generator=torch.Generator().manual_seed(3))[None, :120]
LAYERS = 4


def model_of(**changes) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=211, **changes)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return model_of(num_hidden_layers=LAYERS)


def held_by(model: PreTrainedModel, press, ids: Tensor = PROMPT) -> list[Tensor]:
    """The keys in a DynamicCache after the prompt, under a press or (None) without."""
    cache = DynamicCache()
    with torch.inference_mode():
        if press is None:
            model.model(ids, **with_cache(model.model, cache))
        else:
            with press(model):
                model.model(ids, **with_cache(model.model, cache))
    return [layer.keys for layer in cache.layers]


def kept_by(model: PreTrainedModel, press, ids: Tensor = PROMPT) -> list[list[list[int]]]:
    """Positions of every layer and KV head that a press keeps."""
    pairs = zip(held_by(model, press, ids), held_by(model, None, ids), strict=True)
    return [positions_of(held[0], full[0]) for held, full in pairs]


def read(model: PreTrainedModel, method: Method | str, budget, ids: Tensor = PROMPT):
    """A compressed cache after one prompt."""
    cache = tappa.compressed(model, method, budget)
    with torch.inference_mode():
        model(ids, **with_cache(model, cache))
    return cache


def kept_in(cache: CompressedCache) -> list[list[list[int]]]:
    """Positions of every layer and KV head in a compressed cache."""
    heads = range(len(cache.compressed_layers[0].storage().row_lengths(0)))
    return [[cache.positions_held(i, h) for h in heads] for i in range(len(cache.layers))]


def test_without_kvpress_the_error_says_what_to_install(monkeypatch):
    name = "tappa.integrations.kvpress"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(CompressionError, match="pip install kvpress") as caught:
        importlib.import_module(name)
    assert "\n" not in str(caught.value)


# ---- a press as a scorer


@pytest.mark.parametrize(
    "press",
    [
        KnormPress(),
        SnapKVPress(window_size=8),
        TOVAPress(),
        ExpectedAttentionPress(n_future_positions=16),
    ],
    ids=lambda press: type(press).__name__,
)
def test_scorer_of_keeps_what_the_press_keeps(tiny, press):
    method = Method(scorer_of(press, tiny), budgets.uniform(), window=0)
    with watched() as seen:
        kept = kept_in(read(tiny, method, 30))
    seen.check_clear()
    assert kept == kept_by(tiny, replace(press, compression_ratio=0.75))


def test_scorer_of_with_tappas_budgets(tiny):
    cache = read(tiny, Method(scorer_of(KnormPress()), budgets.similarity(), window=8), 30)
    lengths = [[len(head) for head in layer] for layer in kept_in(cache)]
    assert LAYERS * 3 * 29 < sum(map(sum, lengths)) <= LAYERS * 3 * 30
    assert len({tuple(layer) for layer in lengths}) > 1
    assert all(set(range(112, 120)) <= set(head) for layer in kept_in(cache) for head in layer)


def test_scorer_of_in_a_context_that_is_asked_questions(smollm2, ids):
    model, tokenizer = smollm2.model, smollm2.tokenizer
    method = Method(scorer_of(KnormPress()), budgets.similarity())
    context = tappa.compress_context(model, ids, method, 0.5)
    question = tokenizer("\nWho is Mr. Bingley?", return_tensors="pt").input_ids
    prompt = torch.cat([ids, question], 1)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **with_cache(model, context.cache()),
        max_new_tokens=8,
        do_sample=False,
    )
    assert written.shape[1] > prompt.shape[1]


def test_a_rotary_embedding_is_only_lent():
    model = model_of()
    press = ExpectedAttentionPress(n_future_positions=16)
    read(model, Method(scorer_of(press, model), budgets.uniform(), 0), 30)
    assert not any("rotary_emb" in dict(a.self_attn.named_children()) for a in model.model.layers)
    with pytest.raises(CompressionError, match="pass scorer_of the model"):
        read(model, Method(scorer_of(press), budgets.uniform(), 0), 30)


def test_what_no_scorer_can_be_made_of():
    with pytest.raises(CompressionError, match="attention weights"):
        scorer_of(ObservedAttentionPress())
    with pytest.raises(CompressionError, match="expected a kvpress ScorerPress, got AdaKVPress"):
        scorer_of(AdaKVPress(KnormPress()))


def test_a_press_scores_whole_prompts_only(tiny):
    method = Method(scorer_of(KnormPress()), budgets.uniform(), window=8)
    with pytest.raises(CompressionError, match="one at a time, got 2 rows"):
        read(tiny, method, 30, PROMPT.expand(2, -1))
    with pytest.raises(CompressionError, match="in one go"):
        tappa.compress_context(tiny, PROMPT, method, 30, chunk=60)
    padded = torch.ones_like(PROMPT)
    padded[:, :5] = 0
    with pytest.raises(CompressionError, match="without padding"):
        tappa.compress_context(tiny, PROMPT, method, 30, attention_mask=padded)
    cache = tappa.compressed(tiny, method, 30, every=1)
    with pytest.raises(CompressionError, match="prompts only"):
        tiny.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            **with_cache(tiny, cache),
            max_new_tokens=9,
            eos_token_id=None,
        )
    with pytest.raises(CompressionError, match="SnapKVPress cannot score this prompt"):
        read(tiny, Method(scorer_of(SnapKVPress(window_size=200)), budgets.uniform(), 8), 30)


# ---- our budgets as a press


@pytest.mark.parametrize("name", ["tappa", "cake", "tappa_paper", "pyramidkv", "duo_attention"])
@pytest.mark.parametrize("budget", [36, 60])
def test_tappa_press_keeps_what_tappas_cache_keeps(tiny, name, budget):
    """With the same scores and rule; heads of a layer share its count, as they must in kvpress.

    Layers may differ by one token, since tappa's cache divides its budget anew after each layer.
    duo_attention's budgets differ from head to head in tappa's cache: only their sum is compared.
    """
    method = METHODS[name](window=8)
    whole = replace(method, scorer=window_mean(5), sharing="heads", floor=0.0, name="custom")
    with watched() as seen:
        kept = kept_in(read(tiny, whole, budget))
    seen.check_clear()
    press = TappaPress(SnapKVPress(window_size=8), 1 - budget / 120, whole)
    other = kept_by(tiny, press)
    counts = [len(layer[0]) for layer in other]
    assert all(len(head) == len(layer[0]) for layer in other for head in layer)
    assert LAYERS * (budget - 1) < sum(counts) <= LAYERS * budget
    assert len(set(counts)) > 1
    if name == "duo_attention":
        return
    for mine, theirs in zip(kept, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert abs(len(a) - len(b)) <= 1
            assert set(a) <= set(b) or set(b) <= set(a)


def test_tappa_press_with_a_rule_and_attention_weights():
    model = model_of(num_hidden_layers=LAYERS, attn_implementation="eager")
    press = TappaPress(ObservedAttentionPress(), 0.5, budgets.similarity())
    counts = [keys.shape[2] for keys in held_by(model, press)]
    assert LAYERS * 59 < sum(counts) <= LAYERS * 60
    assert len(set(counts)) > 1


def test_rows_of_a_batch_hold_equally_many(tiny):
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    held = held_by(tiny, TappaPress(KnormPress(), 0.5), ids)
    assert all(keys.shape[0] == 2 for keys in held)
    assert sum(keys.shape[2] for keys in held) <= LAYERS * 60


def test_window_and_sinks_stay_however_high_the_ratio(tiny):
    method = replace(METHODS["tappa"](window=8), sinks=2)
    kept = kept_by(tiny, TappaPress(KnormPress(), 0.99, method))
    assert kept == [[[0, 1, *range(112, 120)]] * 3] * LAYERS


def test_a_failed_pass_leaves_nothing_behind(tiny):
    press, press_again = (TappaPress(KnormPress(), 0.5) for _ in range(2))
    broken = tiny.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with press(tiny):
        with pytest.raises(ZeroDivisionError):
            tiny.model(PROMPT, **with_cache(tiny.model, DynamicCache()))
        broken.remove()
        cache = DynamicCache()
        with torch.inference_mode():
            tiny.model(PROMPT, **with_cache(tiny.model, cache))
    expected = held_by(tiny, press_again)
    assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, expected, strict=True))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_many_new_tokens_at_once_as_one_by_one(kernel):
    """transformers makes one mask, as long as the first layer; others hold more or fewer tokens."""
    model = model_of(num_hidden_layers=LAYERS, attn_implementation=kernel)
    question = PROMPT[:, 50:57]
    logits = []
    for size in (1, 3, 7):
        cache = DynamicCache()
        with torch.inference_mode():
            with TappaPress(SnapKVPress(window_size=8), 0.6)(model):
                model.model(PROMPT, **with_cache(model.model, cache))
            assert len({layer.keys.shape[2] for layer in cache.layers}) > 1
            for part, places in zip(
                question.split(size, 1), torch.arange(120, 127)[None].split(size, 1), strict=True
            ):
                out = model(part, **with_cache(model, cache), position_ids=places)
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-5, rtol=1e-4)
    del cache, out
    gc.collect()
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_what_tappa_press_refuses(tiny):
    with pytest.raises(CompressionError, match="compression_ratio"):
        TappaPress(KnormPress(), 1.0)
    with pytest.raises(CompressionError, match="ScorerPress, got AdaKVPress"):
        TappaPress(AdaKVPress(KnormPress()), 0.5)
    with pytest.raises(CompressionError, match="full has no layer budgets"):
        TappaPress(KnormPress(), 0.5, "full")
    with pytest.raises(CompressionError, match="did you mean 'tappa'"):
        TappaPress(KnormPress(), 0.5, "tapa")


# ---- kvpress's pipeline


def asker(model, tokenizer):
    """kvpress's pipeline on a model."""
    with warnings.catch_warnings(action="ignore"):
        return pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)


def test_the_pipeline_on_a_tiny_llama(tmp_path):
    folder = save_tiny(tmp_path, num_hidden_layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ask = asker(model, AutoTokenizer.from_pretrained(folder))
    questions = ["Who?", "What of it?"]
    caches = {ratio: DynamicCache() for ratio in (None, 0.0, 0.6)}
    answers = {}
    for ratio, cache in caches.items():
        press = None if ratio is None else TappaPress(SnapKVPress(window_size=8), ratio)
        done = ask(TEXT, questions=questions, press=press, cache=cache, max_new_tokens=6)
        answers[ratio] = done["answers"]
    assert answers[0.0] == answers[None]
    assert all(len(part) == 2 and all(part) for part in answers.values())
    tokens = caches[None].get_seq_length()
    counts = [layer.keys.shape[2] for layer in caches[0.6].layers]
    budget = int(tokens * (1 - 0.6))
    assert LAYERS * (budget - 1) < sum(counts) <= LAYERS * budget
    assert len(set(counts)) > 1


def test_the_pipeline_on_smollm2(smollm2, ids):
    """Ratio 0 changes nothing; at 0.5 there is an answer, and half of the tokens."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    ask, text = asker(model, tokenizer), tokenizer.decode(ids[0, :600])
    options = {"question": "Who has taken Netherfield Park?", "max_new_tokens": 12}
    caches = {ratio: DynamicCache() for ratio in (None, 0.0, 0.5)}
    answers = {}
    for ratio, cache in caches.items():
        press = None if ratio is None else TappaPress(SnapKVPress(window_size=32), ratio)
        answers[ratio] = ask(text, **options, press=press, cache=cache)["answer"]
    assert answers[0.0] == answers[None]
    assert len(answers[0.5].split()) > 3
    counts = [layer.keys.shape[2] for layer in caches[0.5].layers]
    budget = int(caches[None].get_seq_length() * 0.5)
    assert len(counts) * (budget - 1) < sum(counts) <= len(counts) * budget
    assert len(set(counts)) > 5


def test_streaming_llm_knows_the_ratio(tiny):
    press = TappaPress(StreamingLLMPress(n_sink=2), 0.5, budgets.uniform())
    assert kept_by(tiny, press) == [[[0, 1, *range(62, 120)]] * 3] * LAYERS
