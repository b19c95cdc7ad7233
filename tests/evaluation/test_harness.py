"""The model type `tappa` of lm-eval, on the packaged SmolLM2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression.stepping import FixedSteps
from tappa.errors import CompressionError, EvaluationError, ModelError, TextError
from tappa.evaluation.harness import TappaLM, read, score_continuation
from tappa.models import LoadedModel
from tappa.texts import packaged_text
from tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("smollm2")
TEXTS = [packaged_text()[start : start + size] for start, size in ((0, 900), (3000, 500))]
PROMPTS = [f"{text}\n\nThe narrator of this text" for text in TEXTS] + ["The sun is a"]
OTHERS = {"until": ["\n\n"], "max_gen_toks": 11, "do_sample": False}


def made(smollm2: LoadedModel, method: str, budget: int, batch: int = 1) -> TappaLM:
    return TappaLM(smollm2.model, method, budget, tokenizer=smollm2.tokenizer, batch_size=batch)


def requests(kind: str, arguments: list) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=number)
        for number, argument in enumerate(arguments)
    ]


def answers(lm: HFLM) -> list[str]:
    return lm.generate_until(
        requests("generate_until", [(p, OTHERS) for p in PROMPTS]), disable_tqdm=True
    )


def likelihoods(lm: HFLM) -> list[tuple[float, bool]]:
    pairs = [(p, c) for p in PROMPTS for c in (" is a woman", " of", " was not there at all")]
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


@pytest.fixture(scope="module")
def plain(smollm2: LoadedModel) -> HFLM:
    return HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=1)


def test_lm_eval_knows_the_type() -> None:
    assert get_model("tappa") is TappaLM
    assert get_model("hf") is HFLM


def test_without_a_gpu_the_default_device_of_lm_eval_is_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = str(save_tiny(tmp_path))
    given = {"pretrained": folder, "method": "streaming_llm", "budget": 64}
    lm = TappaLM.create_from_arg_obj(given, {"device": EvaluatorConfig().device, "batch_size": 1})
    assert lm.device == torch.device("cpu")
    assert lm.model.device == torch.device("cpu")
    with pytest.raises(ModelError, match="got 'cuda:1': PyTorch sees no GPU"):
        TappaLM.create_from_arg_obj(given, {"device": "cuda:1", "batch_size": 1})


@pytest.mark.parametrize(("method", "budget"), [("full", 512), ("tappa", 2000)])
def test_without_compression_it_is_hflm(
    smollm2: LoadedModel, plain: HFLM, method: str, budget: int
) -> None:
    lm = made(smollm2, method, budget)
    with watched(smollm2.model, cuts=False) as seen:
        expected = answers(plain)
    seen.check_clear()
    assert answers(lm) == expected
    for mine, theirs in zip(likelihoods(lm), likelihoods(plain), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3)
        assert mine[1] == theirs[1]


@pytest.mark.parametrize("method", ["streaming_llm", "tappa", "h2o"])
def test_compression_changes_answers(smollm2: LoadedModel, plain: HFLM, method: str) -> None:
    lm = made(smollm2, method, 40)
    mine, theirs = likelihoods(lm), likelihoods(plain)
    moved = [abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True)]
    assert min(moved[:6]) > 1e-3  # the long prompts
    assert max(moved[6:]) < 1e-3  # the short one fits into the budget
    assert answers(lm)[2] == answers(plain)[2]


@pytest.mark.parametrize("method", ["full", "streaming_llm", "snapkv", "tappa"])
def test_a_padded_batch_gives_the_answers_of_one_by_one(smollm2: LoadedModel, method: str) -> None:
    with watched(smollm2.model, cuts=False) as seen:
        expected = answers(made(smollm2, method, 48))
    seen.check_clear()
    assert answers(made(smollm2, method, 48, batch=3)) == expected


@pytest.mark.parametrize(("method", "batch"), [("tappa", 3), ("snapkv", 1)])
def test_fixed_steps_give_the_same_answers(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, method: str, batch: int
) -> None:
    """As on a GPU; a text goes on a little behind the words that end it, which lm-eval cuts off."""
    monkeypatch.setitem(OTHERS, "until", [" of", "\n"])
    lm = made(smollm2, method, 48, batch)
    with watched(smollm2.model, cuts=False) as seen:
        expected = answers(lm)
    seen.check_clear()
    ran: list[int] = []
    run = FixedSteps.run

    def noted(steps: FixedSteps, size: int) -> None:
        ran.append(size)
        run(steps, size)

    monkeypatch.setattr(FixedSteps, "run", noted)
    lm.graph = True
    assert answers(lm) == expected
    assert ran
    sampled = dict(OTHERS, do_sample=True, temperature=0.7, top_p=0.9)
    ran.clear()
    lm.generate_until(requests("generate_until", [(PROMPTS[2], sampled)]), disable_tqdm=True)
    assert not ran


def test_a_continuation_is_scored_on_the_compressed_context(smollm2: LoadedModel) -> None:
    """By hand: prefill, compress, feed the last token and the continuation one by one."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    continuation = tokenizer(" of the house").input_ids
    with torch.inference_mode():
        cache = tappa.compressed(model, "snapkv", 40)
        model(ids[:, :-1], **with_cache(model, cache))
        assert cache.tokens_held() == 40
        cache.frozen = True
        total = 0.0
        for last, token in zip([int(ids[0, -1]), *continuation], continuation, strict=False):
            logits = model(torch.tensor([[last]]), **with_cache(model, cache)).logits[0, -1]
            total += float(logits.float().log_softmax(-1)[token])
    lm = made(smollm2, "snapkv", 40)
    found = lm._loglikelihood_tokens([(None, ids[0].tolist(), continuation)], disable_tqdm=True)
    assert found[0][0] == pytest.approx(total, abs=1e-4)


def test_what_a_copy_scores_does_not_touch_the_next(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    cache = tappa.compressed(smollm2.model, "tappa", 48)
    read(cache, ids, torch.ones_like(ids))
    first = score_continuation(cache.copy(), ids, [5, 7])
    score_continuation(cache.copy(), ids, [11, 13, 17])
    assert score_continuation(cache.copy(), ids, [5, 7]) == first
    assert cache.tokens_seen == ids.shape[1] - 1


def test_a_context_of_one_token_and_a_batch_with_one(smollm2: LoadedModel, plain: HFLM) -> None:
    lm = made(smollm2, "tappa", 48)
    pair = [(None, [100], [200, 300])]
    found, wanted = (m._loglikelihood_tokens(pair, disable_tqdm=True)[0][0] for m in (lm, plain))
    assert found == pytest.approx(wanted, abs=1e-3)
    ids = torch.tensor([[0, 0, 7], [3, 5, 7]])
    cache = lm.new_cache()
    read(cache, ids, torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert cache.tokens_seen == 0  # the first row has no token before its last


@pytest.mark.parametrize("size", [64, 3])
def test_a_context_that_is_too_long_is_cut_for_each_choice(smollm2: LoadedModel, size: int) -> None:
    """As HFLM cuts it: a longer choice of the same context sees less of it."""
    ids = smollm2.tokenizer(TEXTS[0]).input_ids
    choices = ([5], [5, 7, 11], [13, 17], list(range(20, 20 + min(size, 40))))
    pairs = [(None, ids[:n], choice) for n in (150, 61, 64, 2) for choice in choices]
    mine = TappaLM(
        smollm2.model, "full", tokenizer=smollm2.tokenizer, max_length=size, batch_size=1
    )
    theirs = HFLM(
        pretrained=smollm2.model, tokenizer=smollm2.tokenizer, max_length=size, batch_size=1
    )
    found, wanted = (lm._loglikelihood_tokens(pairs, disable_tqdm=True) for lm in (mine, theirs))
    assert [x[0] for x in found] == pytest.approx([x[0] for x in wanted], abs=1e-3)
    with pytest.raises(EvaluationError, match=f"at most {size} tokens.*, got {size + 1}"):
        mine._loglikelihood_tokens([(None, ids[:9], [7] * (size + 1))], disable_tqdm=True)


def test_prompts_and_texts_that_are_too_long_are_as_hflms(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = smollm2.model
    mine = TappaLM(model, "full", tokenizer=smollm2.tokenizer, max_length=48, batch_size=1)
    theirs = HFLM(pretrained=model, tokenizer=smollm2.tokenizer, max_length=48, batch_size=1)
    asked = requests("loglikelihood_rolling", [(TEXTS[1],)])
    rolling = [lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (mine, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-2)
    seen: list[torch.Tensor] = []

    def noted(context: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen.append(context)
        return context

    for lm in (mine, theirs):
        monkeypatch.setattr(lm, "_model_generate", noted)
        lm.generate_until(requests("generate_until", [(PROMPTS[0], OTHERS)]), disable_tqdm=True)
    assert torch.equal(*seen)
    assert seen[0].shape == (1, 48 - 11)


def test_options_of_the_method_and_of_hflm(smollm2: LoadedModel) -> None:
    lm = TappaLM(
        smollm2.model,
        "tappa",
        "0.25",
        tokenizer=smollm2.tokenizer,
        gamma=0.0,
        max_length=512,
        every=4,
    )
    assert (lm.budget, lm.max_length) == (0.25, 512)
    assert lm.new_cache().every == 4
    ids = smollm2.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    cache = lm.new_cache()
    read(cache, ids, torch.ones_like(ids))
    assert cache.tokens_held() <= 0.25 * ids.shape[1]


def test_with_evict_the_budget_is_kept_while_answering(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = smollm2.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    held = {}
    for evict in (False, True):
        lm = TappaLM(smollm2.model, "snapkv", 48, tokenizer=smollm2.tokenizer, evict=evict)
        cache = lm.cache_of(ids, torch.ones_like(ids))
        monkeypatch.setattr(lm, "cache_of", lambda *prompt, cache=cache: cache)
        lm._model_generate(ids, ids.shape[1] + 20, [])
        held[evict] = cache.tokens_held()
    assert held[True] <= 48 < held[False]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "snapvk"}, CompressionError, "did you mean 'snapkv'"),
        ({"budget": 5}, CompressionError, "at least 32 tokens"),
        ({"budget": "many"}, CompressionError, "expected a budget"),
        ({"gama": 1.0}, CompressionError, "no option 'gama'"),
        ({"tokenizer": None}, EvaluationError, "expected a tokenizer"),
    ],
)
def test_bad_arguments(
    smollm2: LoadedModel, arguments: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TappaLM(smollm2.model, **({"tokenizer": smollm2.tokenizer} | arguments))


@pytest.mark.same_kernel
def test_the_model_is_left_as_it_was(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    with torch.inference_mode():
        before = smollm2.model(ids, **with_cache(smollm2.model, DynamicCache())).logits
        answers(made(smollm2, "tappa", 48))
        assert torch.equal(
            before, smollm2.model(ids, **with_cache(smollm2.model, DynamicCache())).logits
        )


def test_what_no_tokenizer_takes_is_told_in_one_line() -> None:
    """Half of a surrogate pair, as JSON may hold it; a chat template that is missing or broken."""
    model = TappaLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), method="full")
    for encode in (model.tok_encode, lambda text: model.tok_batch_encode([text])):
        with pytest.raises(TextError, match=r"surrogate U\+D83D at offset 3 of a text of the task"):
            encode("so \ud83d")
    turns = [{"role": "user", "content": "Hello"}]
    with pytest.raises(TextError, match="this one has none"):
        model.apply_chat_template(turns)
    model.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TextError, match="cannot use the chat template of this tokenizer: no"):
        model.apply_chat_template(turns)


def test_a_generation_config_with_beams_changes_no_answer() -> None:
    plain, beams = tiny_model("llama"), tiny_model("llama")
    beams.generation_config.update(num_beams=3, return_dict_in_generate=True)
    beams.generation_config.cache_implementation = "static"
    ids = torch.tensor([tiny_tokenizer()("Vanity and pride are different").input_ids])
    first = TappaLM(plain, tokenizer=tiny_tokenizer(), method="full")
    with pytest.warns(UserWarning, match="num_beams, which is left out"):
        second = TappaLM(beams, tokenizer=tiny_tokenizer(), method="full")
    answers = [lm._model_generate(ids, ids.shape[1] + 9, ["</s>"]) for lm in (first, second)]
    assert torch.equal(*answers)
