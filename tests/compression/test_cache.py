"""The compressed cache on small models, against the full cache with the dropped tokens masked."""

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression import METHODS, CompressedCache, compress_context, compressed, record
from tappa.compression.layer import CompressedLayer, by_segment
from tappa.errors import CaptureError, CompressionError, ModelError
from tappa.interface import AttentionSwitch
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Callable[..., Any] = make_tiny  # whose generate() and config type checkers do not see
PROMPT = torch.randint(3, 90, (1, 211), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"window": 7}  # so that a budget of 23 tokens has something to decide
HEADWISE: list[tuple[str, dict[str, Any]]] = [
    ("adakv", {}),
    ("tappa", {}),
    ("tappa", {"per_head": True}),
    ("duo_attention", {}),
]
LAYERWISE: list[tuple[str, dict[str, Any]]] = [
    *(("snapkv", {}), ("streaming_llm", {}), ("h2o", {}), ("cake", {}), ("tappa_paper", {})),
]
COMPRESSING = [name for name in METHODS if name != "full"]


def cache_of(model: PreTrainedModel, name: str, budget: float = 23, **options: Any) -> Any:
    return compressed(model, name, budget, **({} if name == "full" else SMALL | options))


def run(model: PreTrainedModel, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, **with_cache(model, cache), **options).logits


class Masked:
    """The same model on a full cache, where a layer sees only what a compressed cache held."""

    def __init__(self, model: PreTrainedModel, compressed_cache: CompressedCache) -> None:
        self.model, self.other = model, compressed_cache
        self.cache = DynamicCache(config=model.config)
        self.switch = AttentionSwitch(model, self.attend)
        self.mask: Tensor | None = None

    def __call__(self, ids: Tensor, **options: Any) -> Tensor:
        self.mask = options.get("attention_mask")
        self.switch.on()
        try:
            return run(self.model, ids, self.cache, **options)
        finally:
            self.switch.off()

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        layer = self.other.layers[module.layer_idx]
        if isinstance(layer, CompressedLayer):
            heads, new = q.shape[1:3]
            seen = k.shape[2]
            # a single token is not followed by a cut, so that what is held is what was seen
            positions = (layer.storage().padded()[2] if new == 1 else layer.positions).long()
            held = torch.zeros(*positions.shape[:2], seen + 1, dtype=torch.bool)
            held.scatter_(2, torch.where(positions < 0, seen, positions), True)
            causal = torch.arange(seen) <= torch.arange(seen - new, seen)[:, None]
            allowed = held[:, :, None, :seen] & causal
            if self.mask is not None:
                allowed = allowed & self.mask[:, None, None].bool()
            mask = allowed.repeat_interleave(heads // positions.shape[1], 1)
        return self.switch.own_kernel(module)(module, q, k, v, mask, **kwargs)


def both(model: PreTrainedModel, cache: CompressedCache, pieces: list[Tensor], **o: Any) -> None:
    """Run both on the same pieces; logits must agree at every step."""
    reference = Masked(model, cache)
    for piece in pieces:
        actual = run(model, piece, cache, **o)
        torch.testing.assert_close(actual, reference(piece, **o), atol=1e-5, rtol=1e-4)


@pytest.mark.same_kernel
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox", "phi3"])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_for_all_changes_no_bit(kind: str, name: str) -> None:
    model = tiny_model(kind)
    full = DynamicCache(config=model.config)
    cache = cache_of(model, name, 1000)
    for piece in (PROMPT[:, :61], PROMPT[:, 61:62], PROMPT[:, 62:67]):
        assert torch.equal(run(model, piece, cache), run(model, piece, full))
    assert cache.tokens_held() == cache.tokens_seen == 67


@pytest.mark.parametrize(("name", "options"), LAYERWISE + HEADWISE)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_decoding_is_that_of_the_full_cache_without_the_dropped_tokens(
    kind: str, name: str, options: dict[str, Any]
) -> None:
    """Prompt, single tokens, several at once, and another long piece."""
    model = tiny_model(kind)
    cache = cache_of(model, name, every=3, **options)
    lengths = [97, 1, 1, 1, 1, 1, 5, 1, 31, 1, 1]
    both(model, cache, list(PROMPT[:, : sum(lengths)].split(lengths, 1)))
    assert cache.tokens_held() < 24 < cache.tokens_seen


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "cohere", "gpt_neox"])
def test_other_architectures_decode_rightly(kind: str) -> None:
    model = tiny_model(kind)
    if kind == "mistral":  # every layer has a window there
        with pytest.raises(CompressionError, match="nothing to compress"):
            cache_of(model, "tappa")
        return
    both(model, cache_of(model, "tappa"), list(PROMPT[:, :104].split([97, 1, 1, 5], 1)))


def test_eager_attention_decodes_rightly() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    cache = cache_of(model, "tappa")
    reference = Masked(model, cache)
    for piece in PROMPT[:, :104].split([97, 1, 1, 5], 1):
        actual = run(model, piece, cache)
        model.set_attn_implementation("sdpa")
        expected = reference(piece)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("budget", [11, 23, 101, 0.25])
def test_what_is_held_after_a_prompt(name: str, budget: float) -> None:
    """The window stays, the budget is kept, and no more is wasted than rounding asks for."""
    model = tiny_model("llama")
    cache = cache_of(model, name, budget, **({"sinks": 4} if name == "duo_attention" else {}))
    run(model, PROMPT, cache)
    each = budget if isinstance(budget, int) else budget * PROMPT.shape[1]
    for layer in range(2):
        for head in range(3):
            positions = cache.positions_held(layer, head)
            assert positions == sorted(set(positions))
            window = cache.method.window
            assert set(positions) >= set(range(211 - window, 211)) | set(range(cache.method.sinks))
    assert each - 2 <= cache.tokens_held() <= each
    assert cache.nbytes == 2 * 4 * 10 * sum(sum(x.held.lengths) for x in cache.layers)


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_larger_budget_keeps_more_of_the_same(name: str) -> None:
    model = tiny_model("llama")
    kept: list[list[set[int]]] = []
    for budget in (17, 37, 79):
        cache = cache_of(model, name, budget)
        run(model, PROMPT, cache)
        kept.append([set(cache.positions_held(n, h)) for n in range(2) for h in range(3)])
    for smaller, larger in itertools.pairwise(kept):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@pytest.mark.parametrize("name", COMPRESSING)
def test_the_budget_is_kept_while_decoding(name: str) -> None:
    model = tiny_model("llama")
    cache = cache_of(model, name, every=4)
    run(model, PROMPT[:, :97], cache)
    for step in range(97, 125):
        run(model, PROMPT[:, step : step + 1], cache)
        assert 23 - 5 <= cache.tokens_held() <= 23
        newest = set(range(step - 6, step + 1))
        if cache.method.window:
            assert all(
                newest <= set(cache.positions_held(n, h)) for n in range(2) for h in range(3)
            )


def test_layers_cut_one_after_the_other_end_as_if_cut_at_once() -> None:
    """The cascade: what the first layer held at first matters not; and memory never runs over."""
    model = tiny_model("llama", num_hidden_layers=5)
    cache = cache_of(model, "cake")
    run(model, PROMPT, cache)
    one_layer = 2 * 4 * 10 * 3 * 211
    assert cache.peak_nbytes <= 5 * 2 * 4 * 10 * 3 * 23 + one_layer
    held = {}
    for n, layer in enumerate(cache.compressed_layers):
        held[n] = [set(cache.positions_held(n, h)) for h in range(3)]
        assert layer.observations[0].prompt_tokens == 211
    again = cache_of(model, "cake")
    run(model, PROMPT, again)
    assert held == {n: [set(again.positions_held(n, h)) for h in range(3)] for n in range(5)}


def test_chunked_prefill_keeps_the_budget() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa")
    both(model, cache, list(PROMPT[:, :197].split(53, 1)))
    assert cache.tokens_held() <= 23
    assert cache.peak_nbytes <= 2 * 4 * 10 * 3 * (2 * 23 + 2 * 53 + 23)


@pytest.mark.parametrize("name", ["tappa", "snapkv", "h2o", "expected_attention"])
def test_padded_rows_are_as_if_alone(name: str) -> None:
    """Left padding: every row keeps the tokens, and gives the logits, that it does by itself."""
    model = tiny_model("llama")
    short, long = PROMPT[:, :83], PROMPT[:, 100:197]
    pad = torch.zeros(1, 14, dtype=torch.int64)
    ids = torch.cat([torch.cat([pad, short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :14] = 0
    cache = cache_of(model, name)
    logits, masks = [], mask
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    pieces = [ids, *PROMPT[:, 200:206].repeat(2, 1).split(1, 1)]
    for piece in pieces:
        logits.append(run(model, piece, cache, attention_mask=masks, position_ids=position_ids))
        masks = torch.cat([masks, torch.ones(2, 1, dtype=torch.int64)], 1)
        position_ids = masks.sum(1, keepdim=True) - 1
    for row, prompt, pads in ((0, short, 14), (1, long, 0)):
        alone = cache_of(model, name)
        with watched() as seen:
            expected = [run(model, p[:1], alone) for p in (prompt, *pieces[1:])]
        seen.check_clear()
        for step, theirs in enumerate(expected):
            actual = logits[step][row : row + 1, -theirs.shape[1] :]
            torch.testing.assert_close(actual, theirs, atol=1e-5, rtol=1e-4)
        for layer in range(2):
            for head in range(3):
                mine = [p - pads for p in cache.positions_held(layer, head, row)]
                assert mine == alone.positions_held(layer, head)


def test_generate_in_a_context_starts_anew_each_time() -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 13, "do_sample": False}
    with cache_of(model, "tappa") as cache:
        first = model.generate(PROMPT, **options)
        again = model.generate(PROMPT, **options)
    assert torch.equal(first, again)
    assert cache.tokens_seen == first.shape[1] - 1
    assert cache.tokens_held() <= 23
    with cache_of(model, "full"):
        assert torch.equal(model.generate(PROMPT, **options), model.generate(PROMPT, **options))
    by_hand = cache_of(model, "tappa")
    assert torch.equal(model.generate(PROMPT, **with_cache(model, by_hand), **options), first)


def test_a_padded_batch_generates_what_its_rows_do() -> None:
    model = tiny_model("llama")
    ids = PROMPT[:, :194].view(2, 97).clone()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0}
    with cache_of(model, "tappa"):
        batch = model.generate(ids, attention_mask=mask, **options)
        for row, start in ((0, 0), (1, 20)):
            with watched(model) as seen:
                alone = model.generate(ids[row : row + 1, start:], **options)
            seen.check_text(batch[row : row + 1, start : start + alone.shape[1]], alone, least=8)


def test_beam_search_with_room_for_all_is_that_of_the_full_cache() -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False}
    expected = model.generate(PROMPT[:, :41], **options)
    with cache_of(model, "tappa", 100):
        assert torch.equal(model.generate(PROMPT[:, :41], **options), expected)
    with cache_of(model, "tappa") as cache:
        model.generate(PROMPT, **options)
    assert cache.tokens_held() <= 23


def test_rows_can_be_chosen_and_repeated() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "adakv")
    run(model, PROMPT[:, :210].view(3, 70), cache)
    held = [cache.positions_held(1, 2, row) for row in range(3)]
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert [cache.positions_held(1, 2, row) for row in range(4)] == [held[i] for i in (2, 2, 0, 0)]
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert cache.positions_held(1, 2, 0) == held[0]
    assert run(model, PROMPT[:, :4].view(4, 1), cache).shape[0] == 4


@pytest.mark.same_kernel
def test_crop_takes_back_the_last_tokens() -> None:
    """As speculative decoding does: the rejected tokens leave no trace in later logits."""
    model = tiny_model("llama")
    cache, straight = cache_of(model, "tappa"), cache_of(model, "tappa")
    for c in (cache, straight):
        run(model, PROMPT[:, :97], c)
    run(model, PROMPT[:, 97:102], cache)
    cache.crop(-3)
    run(model, PROMPT[:, 97:102], straight)
    straight.crop(-3)
    assert cache.tokens_seen == 99
    for layer in range(2):
        assert cache.positions_held(layer, 0)[-2:] == [97, 98]
    both_logits = [run(model, PROMPT[:, 150:151], c) for c in (cache, straight)]
    assert torch.equal(*both_logits)
    with pytest.raises(CompressionError, match="cannot crop to 90 tokens"):
        cache.crop(-10)


def test_crop_is_refused_where_it_cannot_be_undone() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "h2o")
    run(model, PROMPT[:, :97], cache)
    run(model, PROMPT[:, 97:99], cache)
    with pytest.raises(CompressionError, match="crop cannot undo"):
        cache.crop(-1)


def test_assisted_generation_gives_the_tokens_of_the_model_alone() -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", num_hidden_layers=1)
    options = {"max_new_tokens": 9, "do_sample": False}
    with watched(model) as seen:
        expected = model.generate(PROMPT[:, :61], **options)
    cache = cache_of(model, "tappa", 200)
    actual = model.generate(
        PROMPT[:, :61], **with_cache(model, cache), assistant_model=assistant, **options
    )
    seen.check_text(actual, expected, least=7)


@pytest.mark.parametrize("chunk", [None, 53])
def test_one_context_answers_many_questions(chunk: int | None) -> None:
    model = tiny_model("llama")
    context = compress_context(model, PROMPT, "tappa", 23, chunk=chunk, **SMALL)
    assert context.tokens_seen == 211
    assert context.nbytes <= 2 * 4 * 10 * 3 * 2 * 23
    questions = [PROMPT[:, :41], PROMPT[:, 50:59]]
    answers = [run(model, q, context.cache()) for q in questions]
    for question, answer in zip(questions, answers, strict=True):
        cache = context.cache()
        before = cache.tokens_held(0, 0)
        one_by_one = [run(model, token, cache) for token in question.split(1, 1)]
        torch.testing.assert_close(torch.cat(one_by_one, 1), answer, atol=1e-5, rtol=1e-4)
        assert cache.tokens_held(0, 0) == before + question.shape[1]  # nothing is dropped any more
    ids = torch.cat([PROMPT, questions[0]], 1)
    options = {"max_new_tokens": 3, "do_sample": False}
    with watched(model) as seen:
        whole = model.generate(ids, **with_cache(model, context.cache()), **options)
    assert seen.clear_steps(0) >= 1, "a near tie: choose another question"
    assert int(whole[0, 252]) == int(answers[0][0, -1].argmax())


def test_a_cache_leaves_no_trace_in_the_model() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "expected_attention")
    run(model, PROMPT, cache)
    assert model.config._attn_implementation == "sdpa"
    assert all(not m._forward_pre_hooks for m in model.modules() if m is not model)
    del cache
    gc.collect()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_failed_pass_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa")
    kept = model.lm_head.forward

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        run(model, PROMPT, cache)
    monkeypatch.setattr(model.lm_head, "forward", kept)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(CompressionError, match="failed"):
        run(model, PROMPT, cache)
    cache.reset()
    assert run(model, PROMPT, cache).shape[1] == 211


def test_another_prompt_needs_a_reset() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa")
    run(model, PROMPT, cache)
    with pytest.raises((CompressionError, IndexError)) as error:  # 5.2 raises by itself, earlier
        model.generate(PROMPT[:, :50], **with_cache(model, cache), max_new_tokens=2)
    assert "reset" in str(error.value) or Version(transformers.__version__) < Version("5.3")
    with pytest.raises(CompressionError, match="reset"):
        run(model, PROMPT[:, :40].view(2, 20), cache)
    assert run(model, PROMPT[:, :1], cache).isfinite().all()  # nothing was lost


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(CompressionError, match="flex_attention"):
        run(model, PROMPT, cache)


def test_a_model_without_the_attention_interface_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(CompressionError, match=r"LlamaForCausalLM does not use .* interface"):
        cache_of(model, "tappa")
    assert not model._forward_pre_hooks


def test_a_model_is_not_compressed_within_a_capture() -> None:
    model = tiny_model("llama")
    switch = AttentionSwitch(model, lambda *a, **k: None)  # type: ignore[arg-type]
    cache = cache_of(model, "tappa")
    switch.on()
    try:
        with pytest.raises((CompressionError, CaptureError)):
            run(model, PROMPT, cache)
    finally:
        switch.off()


def test_segments_one_by_one_are_the_padded_whole() -> None:
    """The path for kernels that take no mask, with sdpa in their place."""
    model = tiny_model("llama")
    cache = cache_of(model, "adakv")
    run(model, PROMPT[:, :210].view(2, 105), cache)
    layer = cache.compressed_layers[1]
    module = model.model.layers[1].self_attn
    query = torch.randn(2, 6, 1, 10, generator=torch.Generator().manual_seed(0))
    kernel = AttentionSwitch(model, lambda *a: None)  # type: ignore[arg-type]
    keys, values, layer.positions = layer.storage().padded()
    layer.given, layer.whole, layer.split = layer.storage().lengths, False, False
    sdpa: Callable[..., Any] = kernel.own_kernel(module)
    expected = sdpa(module, query, keys, values, layer.mask_for(None, query), scaling=0.3)[0]
    actual = by_segment(sdpa, layer, module, query, (keys, values), {"scaling": 0.3})
    torch.testing.assert_close(actual, expected)


def test_compiled_models_run_with_graph_breaks() -> None:
    model = tiny_model("llama")
    cache, plain = cache_of(model, "tappa"), cache_of(model, "tappa")
    quick: Any = torch.compile(model, backend="eager")
    for piece in PROMPT[:, :100].split([97, 1, 1, 1], 1):
        expected = run(model, piece, plain)
        torch.testing.assert_close(run(quick, piece, cache), expected, atol=1e-5, rtol=1e-4)
    assert cache.tokens_held() <= 23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype=dtype)
    cache = cache_of(model, "tappa")
    for piece in PROMPT[:, :100].split([97, 1, 1, 1], 1):
        assert run(model, piece, cache).isfinite().all()
    assert cache.nbytes <= 2 * 2 * 10 * 3 * 2 * 23


def test_budgets_of_an_analysis(tmp_path: Any) -> None:
    model = tiny_model("llama")
    text = "Vanity and pride are different things, Mary said, though often confused."
    analysis = tappa.analyze(model, tiny_tokenizer(), text, tokens=60)
    path = analysis.save(tmp_path / "a.json")
    for source in (analysis, path, str(path)):
        cache = cache_of(model, "tappa", per_head=True, analysis=source)
        run(model, PROMPT, cache)
        frame = analysis.to_frame()
        similarity = frame.groupby(["layer", "kv_head"])["q_similarity"].mean().to_numpy()
        held = [n for layer in cache.layers for n in layer.held.lengths]
        order = sorted(range(6), key=lambda i: similarity[i])
        assert sorted(held, reverse=True) == [held[i] for i in order]
    with pytest.raises(CompressionError, match="attention of the prompt"):
        cache_of(model, "cake", analysis=analysis)
    with pytest.raises(CompressionError, match="another model"):
        cache_of(tiny_model("qwen3"), "tappa", analysis=analysis)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.same_kernel
@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_recording_gives_the_caches_that_reading_gives(name: str, kind: str) -> None:
    """Read once, compressed often: the same tokens stay, and the next logits are the same."""
    model = tiny_model(kind)
    recording = record(model, PROMPT)
    budgets = [37, 23, 0.3]
    made = recording.compress(name, budgets, **SMALL)
    for budget, cache in zip(budgets, made, strict=True):
        direct = cache_of(model, name, budget)
        with watched() as seen:
            run(model, PROMPT, direct)
        assert seen.cuts  # both ran the same kernels, so that near ties go the same way
        for mine, theirs in zip(cache.compressed_layers, direct.compressed_layers, strict=True):
            assert mine.storage().lengths == theirs.storage().lengths
            expected = theirs.storage().figures["position"]
            assert torch.equal(mine.storage().figures["position"], expected)
        for token in PROMPT[:, :12].split(1, 1):
            expected = run(model, token, direct)
            torch.testing.assert_close(run(model, token, cache), expected, atol=1e-5, rtol=1e-4)


def test_copies_are_independent() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa")
    run(model, PROMPT, cache)
    twin = cache.copy()
    before = copy.deepcopy([layer.held.lengths for layer in cache.layers])
    for step in range(12):
        run(model, PROMPT[:, step : step + 1], twin)
    assert [layer.held.lengths for layer in cache.layers] == before
    assert (cache.tokens_seen, twin.tokens_seen) == (211, 223)


@pytest.mark.same_kernel
@pytest.mark.parametrize("name", ["tappa", "snapkv"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, CompressedCache.copy])
def test_every_way_to_copy_a_cache_is_the_same(name: str, copied: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    cache = cache_of(model, name)
    run(model, PROMPT[:, :97], cache)
    twin = copied(cache)
    assert twin.model is model
    for piece in PROMPT[:, 97:110].split([1, 7, 5], 1):
        assert torch.equal(run(model, piece, twin), run(model, piece, cache))


def test_a_cache_is_not_for_another_model() -> None:
    model, twin = tiny_model("llama"), tiny_model("llama")
    cache = cache_of(model, "tappa")
    for other in (twin, model.model):
        with pytest.raises(CompressionError, match="made for another model"):
            other(PROMPT, **with_cache(other, cache))
    assert run(model, PROMPT, cache).isfinite().all()


def test_bytes_beside_keys_and_values_do_not_grow() -> None:
    model = tiny_model("llama")
    cache = cache_of(model, "tappa", expected_share=0.5)
    run(model, PROMPT[:, :97], cache)
    window, moments = 6 * 7 * 10 * 4 + 7 * 8, 6 * 10 * 4 + 6 * 10 * 10 * 4
    assert cache.beside_nbytes >= 2 * (window + moments)
    before = cache.beside_nbytes
    for step in range(97, 130):
        run(model, PROMPT[:, step : step + 1], cache)
        assert cache.beside_nbytes <= before + 2 * 3 * 8 * 8  # positions of some tokens
    assert cache_of(model, "snapkv").beside_nbytes == 0


def test_assisted_generation_drops_tokens_and_takes_back_drafts() -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", num_hidden_layers=1)
    cache = cache_of(model, "snapkv", every=3)
    options = {"max_new_tokens": 19, "do_sample": False, "eos_token_id": None}
    written = model.generate(
        PROMPT[:, :97], **with_cache(model, cache), assistant_model=assistant, **options
    )
    assert written.shape[1] == 97 + 19
    assert cache.tokens_held() <= 23 < cache.tokens_seen


def test_a_model_without_rope_is_refused_where_rope_is_needed() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ModelError, match="RoPE"):
        cache_of(model, "tappa")
    cache = cache_of(model, "snapkv")
    run(model, PROMPT, cache)
    assert cache.tokens_held() == 23


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 0).long(), torch.zeros(5).long(), torch.zeros(1, 5)], ids=str
)
def test_token_ids_that_do_not_do(ids: Tensor) -> None:
    model = tiny_model("llama")
    for use in (lambda: record(model, ids), lambda: compress_context(model, ids, "tappa", 64)):
        with pytest.raises(CompressionError, match="expected token ids of shape"):
            use()
    with pytest.raises(CompressionError, match="chunk as a whole number from 1 on"):
        compress_context(model, PROMPT, "tappa", 64, chunk=0)
