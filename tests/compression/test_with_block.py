"""`with tappa.compressed(...)` in daily use: what `generate` does beside writing does no harm."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicSlidingWindowLayer

import tappa
from near_ties import watched
from tappa.cache_argument import NAMES, cache_name, with_cache
from tappa.errors import CompressionError, ModelError
from tappa.versions import TESTED
from tiny import tiny_model as make_tiny

tiny_model: Callable[..., Any] = make_tiny  # whose generate() type checkers do not see
IDS = torch.randint(3, 97, (1, 61), generator=torch.Generator().manual_seed(5))
REPEATED = IDS[:, :13].repeat(1, 5)
NEW = 11
NOTHING_READ = "nothing was compressed: LlamaForCausalLM read no prompt"
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "min_new_tokens": NEW}


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


class Contrast(LogitsProcessor):
    """Asks the model itself, without a cache, while it writes."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.asked += 1
        return scores - 0.1 * self.model(input_ids[:, -7:]).logits[:, -1]


def asking(model: Any) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Contrast(model)])}


MEANWHILE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a processor that calls the model": asking,
    "the model as its own assistant": lambda model: {"assistant_model": model},
    "drafts of fewer layers": lambda model: {"assistant_early_exit": 1},
    "guidance": lambda model: {"guidance_scale": 1.5},
    "beams": lambda model: {"num_beams": 3},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "a static cache": lambda model: {"cache_implementation": "static"},
}


DRAFTS = ("the model as its own assistant", "drafts of fewer layers", "prompt lookup")
TAKES_BACK = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("what", MEANWHILE)
def test_the_full_cache_gives_the_text_of_the_model_alone(what: str, kind: str) -> None:
    model = tiny_model(kind)
    ids = REPEATED if what == "prompt lookup" else IDS
    plain = {"max_new_tokens": NEW, "do_sample": False}
    try:
        with watched(model) as seen:
            expected = model.generate(ids, **plain, **MEANWHILE[what](model))
    except (TypeError, RuntimeError) as error:
        if transformers.__version__ == TESTED[1]:
            raise
        pytest.skip(f"transformers {transformers.__version__} fails without tappa: {error}"[:90])
    with tappa.compressed(model, "full") as cache:
        if what in DRAFTS and kind == "gemma3" and not TAKES_BACK:
            with pytest.raises(CompressionError, match="sliding window, which take back no token"):
                model.generate(ids, **plain, **MEANWHILE[what](model))
            return
        found = model.generate(ids, **plain, **MEANWHILE[what](model))
    if what == "a static cache":  # attends over as many tokens as there may be, with a mask
        seen.check_text(found, expected, least=8)
    else:
        assert torch.equal(found, expected)
    assert found.shape[1] - 5 <= cache.tokens_seen <= found.shape[1]
    assert "generate" not in vars(model)


def test_what_generate_calls_leaves_the_budget_alone(model: Any) -> None:
    with tappa.compressed(model, "snapkv", 40) as cache:
        model.generate(IDS, **GREEDY, **asking(model))
    assert cache.tokens_seen == IDS.shape[1] + NEW - 1
    assert 24 < cache.tokens_held() <= 40


def test_every_generate_starts_with_an_empty_cache(model: Any) -> None:
    with tappa.compressed(model, "snapkv", 40) as cache:
        first = model.generate(IDS, **GREEDY)
        model.generate(IDS[:, :23], **GREEDY)
        assert cache.tokens_seen == 23 + NEW - 1
        assert torch.equal(model.generate(IDS, **GREEDY), first)


def test_a_cache_of_ones_own_is_used_inside_with(model: Any) -> None:
    own = tappa.compressed(model, "full")
    other = tappa.compressed(model, "snapkv", 40)
    with pytest.warns(UserWarning, match=NOTHING_READ), other:
        model.generate(IDS, **with_cache(model, own), **GREEDY)
    assert (own.tokens_seen, other.tokens_seen) == (IDS.shape[1] + NEW - 1, 0)


def test_a_with_that_compressed_nothing_says_so(model: Any) -> None:
    with pytest.warns(UserWarning, match=NOTHING_READ), tappa.compressed(model, "snapkv", 40):
        model(IDS, use_cache=False)


def test_an_error_inside_with_is_all_that_is_told(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), tappa.compressed(model, "snapkv", 40):
            raise ZeroDivisionError
    assert "generate" not in vars(model)


def test_with_blocks_of_one_model_nest(model: Any) -> None:
    with tappa.compressed(model, "full") as outer:
        model.generate(IDS, **GREEDY)
        with tappa.compressed(model, "snapkv", 40) as inner:
            model.generate(IDS[:, :31], **GREEDY)
        model.generate(IDS[:, :17], **GREEDY)
    assert (outer.tokens_seen, inner.tokens_seen) == (17 + NEW - 1, 31 + NEW - 1)
    assert "generate" not in vars(model)


# ---- how the cache gets in


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_takes_the_cache_by_both_names(model: Any, name: str) -> None:
    cache = tappa.compressed(model, "snapkv", 40)
    model(IDS, **{name: cache})  # warnings are errors
    assert (cache.tokens_seen, cache.tokens_held()) == (61, 40)


def test_generate_warns_of_no_name_that_is_the_models_own(model: Any) -> None:
    cache = tappa.compressed(model, "full")
    model.generate(IDS, **{cache_name(model): cache}, **GREEDY)
    assert cache.tokens_seen == 61 + NEW - 1


@pytest.mark.parametrize("by", ["with", "argument"])
def test_use_cache_false_in_a_generation_config_does_no_harm(model: Any, by: str) -> None:
    expected = model.generate(IDS, **GREEDY)
    assert model.generation_config is not None
    model.generation_config.use_cache = False
    cache = tappa.compressed(model, "full")
    if by == "with":
        with cache:
            found = model.generate(IDS, **GREEDY)
    else:
        found = model.generate(IDS, **with_cache(model, cache), **GREEDY)
    assert torch.equal(found, expected)
    assert cache.tokens_seen == 61 + NEW - 1


def test_use_cache_false_of_the_caller_is_heeded(model: Any) -> None:
    expected = model.generate(IDS, use_cache=False, **GREEDY)
    with pytest.warns(UserWarning, match=NOTHING_READ), tappa.compressed(model, "snapkv", 40):
        assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), expected)


# ---- rows of the full cache


def recorded_full(model: Any) -> Any:
    return tappa.compress_context(model, IDS, "full").cache()


def next_logits(model: Any, cache: Any, rows: int) -> Tensor:
    return model(IDS[:, :1].expand(rows, -1), **with_cache(model, cache)).logits


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_the_full_cache_can_be_repeated_and_chosen(model: Any, rows: int) -> None:
    cache, alone = recorded_full(model), next_logits(model, recorded_full(model), 1)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.arange(rows))
    found = next_logits(model, cache, rows)
    torch.testing.assert_close(found, alone.expand_as(found), atol=1e-5, rtol=1e-4)


# ---- gradients, copies, pickles


METHODS = ["full", "snapkv", "tappa", "h2o", "cake", "expected_attention", "streaming_llm"]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_gradients_leaves_none_in_the_cache(model: Any, method: str) -> None:
    model.requires_grad_(True)
    options: dict[str, Any] = {} if method in ("full", "streaming_llm") else {"window": 7}
    cache = tappa.compressed(model, method, None if method == "full" else 40, **options)
    for piece in (IDS, IDS[:, :1], IDS[:, :1]):
        model(piece, **with_cache(model, cache))
    held = [x for layer in cache.compressed_layers for x in vars(layer.held).values()]
    seen = [
        x for layer in cache.compressed_layers for one in layer.observations for x in one.tensors()
    ]
    tensors = [x for x in (*held, *seen) if isinstance(x, Tensor)]
    assert len(tensors) >= 4
    assert not any(x.requires_grad for x in tensors)


def test_a_copy_of_a_model_has_no_part_in_a_cache(model: Any) -> None:
    cache = tappa.compressed(model, "snapkv", 40)
    twin = copy.deepcopy(model)
    with pytest.raises(CompressionError, match="this cache was made for another model"):
        twin.generate(IDS, **with_cache(twin, cache), **GREEDY)
    model.generate(IDS, **with_cache(model, cache), **GREEDY)
    assert cache.tokens_held() <= 40


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("inside", [True, False])
def test_a_model_is_copied_while_a_cache_lives(
    model: Any, way: Callable[[Any], Any], inside: bool
) -> None:
    expected = model.generate(IDS, **GREEDY)
    cache = tappa.compressed(model, "snapkv", 40)
    if inside:
        with cache:
            twin = way(model)
            assert torch.equal(twin.generate(IDS, **GREEDY), expected)
            assert cache.tokens_seen == 0
            model.generate(IDS, **GREEDY)
    else:
        twin = way(model)
        assert torch.equal(twin.generate(IDS, **GREEDY), expected)
        model.generate(IDS, **with_cache(model, cache), **GREEDY)
    assert cache.tokens_seen == 61 + NEW - 1


# ---- models of peft


of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zeros at first, which change nothing
                torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@of_peft
@pytest.mark.parametrize("by", ["with", "argument"])
def test_a_model_with_lora_is_compressed(model: Any, by: str) -> None:
    plain = model.generate(IDS, **GREEDY)
    wrapped = with_lora(model)
    expected = wrapped.generate(input_ids=IDS, **GREEDY)
    assert not torch.equal(expected, plain)
    cache = tappa.compressed(wrapped, "snapkv", 101)
    if by == "with":
        with cache:
            found = wrapped.generate(input_ids=IDS, **GREEDY)
    else:
        found = wrapped.generate(input_ids=IDS, **with_cache(model, cache), **GREEDY)
    assert torch.equal(found, expected)
    assert cache.tokens_seen == 61 + NEW - 1


@of_peft
def test_virtual_tokens_are_refused(model: Any) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    wrapped = peft.get_peft_model(model, settings).eval()
    for use in (
        lambda: tappa.compressed(wrapped, "snapkv", 40),
        lambda: tappa.record(wrapped, IDS),
        lambda: tappa.compress_context(wrapped, IDS, "snapkv", 40),
    ):
        with pytest.raises(ModelError, match=r"without virtual tokens, .* got PREFIX_TUNING"):
            use()
