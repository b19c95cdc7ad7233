import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import tappa
from tappa.compression import METHODS, CompressedCache, Method, compress_context, describe_methods
from tappa.compression.methods import method_named
from tappa.errors import CompressionError
from tappa.similarity import PAPER_KV_CACHE
from tiny import tiny_model, tiny_tokenizer

NAMES = [
    *("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "expected_attention", "cake"),
    *("tappa_paper", "adakv", "tappa", "duo_attention"),
]
IDS = torch.arange(3, 64)[None]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A model that fails when it is run."""
    model = tiny_model("llama")

    def refuse(*args: object) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(refuse)
    return model


@pytest.fixture(scope="module")
def analysis() -> tappa.Analysis:
    text = "Vanity and pride are different things, Mary said, though often confused."
    return tappa.analyze(tiny_model("llama"), tiny_tokenizer(), text, tokens=60)


def test_the_table_of_methods() -> None:
    assert list(METHODS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_method(name: str) -> None:
    method = method_named(name)
    assert isinstance(method, Method)
    assert method.name == name
    assert (method.rule is None) == (name == "full")


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_described_with_its_source(name: str) -> None:
    described = describe_methods()
    assert list(described) == NAMES
    source = re.search(r"\((arXiv )?\d{4}\.\d{5}\)\.$|\(tappa\)\.$", described[name])
    assert bool(source) == (name != "full")
    assert 20 < len(described[name]) < 100


@pytest.mark.parametrize(
    ("name", "window", "sinks", "sharing", "needs", "evidence"),
    [
        ("streaming_llm", 32, 4, "heads", set(), set()),
        ("h2o", 32, 0, "heads", {"received"}, set()),
        ("snapkv", 32, 0, "heads", {"window"}, set()),
        ("pyramidkv", 32, 0, "heads", {"window"}, set()),
        ("expected_attention", 0, 4, "heads", {"moments"}, set()),
        ("cake", 32, 0, "heads", {"window"}, {"window"}),
        ("tappa_paper", 32, 0, "heads", {"window"}, {"similarity"}),
        ("adakv", 32, 0, "pooled", {"window"}, set()),
        ("tappa", 32, 0, "pooled", {"window"}, {"similarity", "window"}),
        ("duo_attention", 32, 4, "heads", set(), {"predictability"}),
    ],
)
def test_what_methods_keep_and_need(
    name: str, window: int, sinks: int, sharing: str, needs: set[str], evidence: set[str]
) -> None:
    method = method_named(name)
    assert method.rule is not None
    assert (method.window, method.sinks, method.sharing) == (window, sinks, sharing)
    assert method.least == window + sinks
    assert (method.scorer.needs, method.rule.needs) == (needs, evidence)


def test_options_reach_scorer_and_rule() -> None:
    method = method_named("tappa", window=7, per_head=True, variant=PAPER_KV_CACHE, cake_share=0.5)
    assert method.rule is not None
    assert (method.window, method.sharing, method.rule.per_head) == (7, "heads", True)
    assert (method.rule.variant, method.rule.needs) == (PAPER_KV_CACHE, {"similarity", "window"})
    pure = method_named("tappa", cake_share=0.0, expected_share=0.0)
    assert pure.rule is not None
    assert (pure.scorer.needs, pure.rule.needs) == ({"window"}, {"similarity"})
    assert method_named("tappa", expected_share=0.5).scorer.needs == {"window", "moments"}
    assert method_named("adakv", floor=0.75).floor == 0.75
    mixed = method_named("tappa_paper", alpha=7.0).rule
    assert mixed is not None
    assert mixed.needs == {"similarity", "window"}


def test_two_names_are_the_scores_of_one_and_the_budgets_of_the_other() -> None:
    method = method_named("expected_attention+tappa", exponent=1.0, sinks=2, window=5)
    assert method.name == "expected_attention+tappa"
    assert method.scorer.needs == {"moments"}
    assert method.rule is not None
    assert method.rule.needs == {"similarity", "window"}
    assert (method.sharing, method.window, method.sinks) == ("pooled", 5, 2)
    most = method_named("expected_attention+snapkv")
    assert (most.window, most.sinks) == (32, 4)  # the most of both
    assert method_named("snapkv+full").rule is None
    assert method_named("h2o+cake").scorer.needs == {"received"}
    assert method_named("cake+h2o").scorer.needs == {"window"}


def test_a_method_is_taken_as_it_is() -> None:
    mine = replace(method_named("snapkv"), sinks=3, name="mine")
    assert method_named(mine) is mine
    assert method_named(mine, window=7) == replace(mine, window=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapk", "got 'snapk'; did you mean 'snapkv'?"),
        ("SnapKV", "got 'SnapKV'"),
        ("tapa", "did you mean 'tappa'?"),
        ("duo-attention", "did you mean 'duo_attention'?"),
        ("pyramid_kv", "did you mean 'pyramidkv'?"),
        ("snapkv+tapa", "got 'tapa'; did you mean 'tappa'?"),
        ("h20+tappa", "got 'h20'; did you mean 'h2o'?"),
        ("snapkv+tappa+cake", r"got 'snapkv\+tappa\+cake'"),
        ("snapkv+", "got ''$"),
        ("", "got ''$"),
        ("zzz", "got 'zzz'$"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, message: str, llama: PreTrainedModel) -> None:
    with pytest.raises(CompressionError, match=message) as error:
        tappa.compressed(llama, name, 64)
    assert "expected a method of full, streaming_llm, h2o" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("snapkv", "gamma", "snapkv takes kernel, window; it has no option 'gamma'"),
        ("full", "window", "full takes no options; it has no option 'window'"),
        ("h2o+snapkv", "sinks", r"h2o\+snapkv takes kernel, window; it has no option 'sinks'"),
    ],
)
def test_unknown_options(name: str, option: str, message: str, llama: PreTrainedModel) -> None:
    options: Any = {option: 7}
    with pytest.raises(CompressionError, match=message):
        tappa.compressed(llama, name, 64, **options)


def test_unknown_options_of_a_method_of_ones_own(llama: PreTrainedModel) -> None:
    with pytest.raises(CompressionError, match="gamma"):
        tappa.compressed(llama, method_named("snapkv"), 64, gamma=7)


BAD_BUDGETS = [
    (None, "expected a budget in tokens .* got None"),
    (True, "got True"),
    (False, "got False"),
    ("x", "got the string 'x'"),
    ("many tokens", "got the string 'many tokens'"),
    ([64], r"got \[64\]"),
    (0, "above 0, .* got 0"),
    (0.0, "above 0, .* got 0.0"),
    (-7, "above 0, .* got -7"),
    (-0.5, "above 0, .* got -0.5"),
    (math.nan, "above 0, .* got nan"),
    (math.inf, "above 0, .* got inf"),
    (-math.inf, "above 0, .* got -inf"),
    (1.5, "share of at most 1.0, got 1.5"),
    (2.0, "share of at most 1.0, got 2.0"),
    (64.0, "share of at most 1.0, got 64.0"),
    (np.float64(64), "share of at most 1.0, got 64.0"),
    (1, "at least 35 tokens, which .* always keeps .window 31, sinks 4., got 1"),
    (34, "at least 35 tokens, .* got 34"),
    (np.int64(34), "at least 35 tokens, .* got 34"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("budget", "message"), BAD_BUDGETS, ids=lambda x: str(x)[:20])
def test_budgets_that_cannot_work(budget: Any, message: str, llama: PreTrainedModel) -> None:
    """Refused before the model runs, in one line."""
    for use in (
        lambda: tappa.compressed(llama, "streaming_llm", budget, window=31),
        lambda: compress_context(llama, IDS, "streaming_llm", budget, window=31),
    ):
        with pytest.raises(CompressionError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (35, 35),
        (10**6, 10**6),
        (np.int64(37), 37),
        (np.int32(37), 37),
        (np.uint8(37), 37),
        (torch.tensor(37), 37),
        (1, 1),
        (1.0, 1.0),
        (0.25, 0.25),
        (1e-9, 1e-9),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
    ],
)
def test_budgets_that_work(budget: Any, expected: float, llama: PreTrainedModel) -> None:
    """An int is a number of tokens, a float a share: 1 and 1.0 are not the same."""
    window = 1 if expected == 1 else 31
    method = method_named("streaming_llm", window=window, sinks=0 if expected == 1 else 4)
    found = tappa.compressed(llama, method, budget).budget
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("budget", [None, 64, 0.5])
def test_full_takes_any_budget(budget: float | None, llama: PreTrainedModel) -> None:
    cache = tappa.compressed(llama, "full", budget)
    assert isinstance(cache, CompressedCache)
    assert cache.budget is None


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("every", [0, -1, True, 1.5, "x", None])
def test_steps_that_cannot_work(every: Any, llama: PreTrainedModel) -> None:
    with pytest.raises(CompressionError, match=f"every as a whole number from 1 on, got {every!r}"):
        tappa.compressed(llama, "snapkv", 64, every=every)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"window": 0}),  # no queries to score with
        ("snapkv", {"window": -1}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"kernel": 0}),
        ("streaming_llm", {"sinks": -1}),
        ("expected_attention", {"future": 0}),
        ("adakv", {"floor": 1.5}),
        ("adakv", {"floor": -0.5}),
        ("pyramidkv", {"beta": 0.0}),
        ("cake", {"tau1": 0.0}),
        ("snapkv", {"window": 4.5}),
        ("snapkv", {"window": "4"}),
        ("tappa", {"variant": "x"}),
    ],
)
def test_options_that_cannot_work(
    name: str, options: dict[str, Any], llama: PreTrainedModel
) -> None:
    with pytest.raises(CompressionError, match=next(iter(options))):
        tappa.compressed(llama, name, 64, **options)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {}, "class is LlamaForCausalLM there and Qwen3ForCausalLM here"),
        ("llama", {"num_hidden_layers": 3}, "layers is 2 there and 3 here"),
        ("llama", {"num_attention_heads": 3}, "heads is 6 there and 3 here"),
        ("llama", {"num_key_value_heads": 2}, "kv_heads is 3 there and 2 here"),
    ],
)
def test_an_analysis_of_another_model(
    kind: str, changes: dict[str, int], message: str, analysis: tappa.Analysis
) -> None:
    with pytest.raises(CompressionError, match=f"another model: {message}"):
        tappa.compressed(tiny_model(kind, **changes), "tappa", 64, analysis=analysis)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cake", {}, "cake takes its budgets from the attention of the prompt"),
        ("h2o+cake", {}, r"h2o\+cake takes its budgets from the attention of the prompt"),
        ("tappa_paper", {"alpha": 7.0}, "tappa_paper takes its budgets from the attention"),
        ("full", {}, "full has no budgets to take from an Analysis"),
    ],
)
def test_methods_that_cannot_use_an_analysis(
    name: str,
    options: dict[str, Any],
    message: str,
    llama: PreTrainedModel,
    analysis: tappa.Analysis,
) -> None:
    with pytest.raises(CompressionError, match=message):
        tappa.compressed(llama, name, 64, analysis=analysis, **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_analysis(llama: PreTrainedModel) -> None:
    wrong: Any = 3
    with pytest.raises(CompressionError, match="expected an Analysis or the path of one, got 3"):
        tappa.compressed(llama, "tappa", 64, analysis=wrong)


def test_preferences_of_an_analysis(llama: PreTrainedModel, analysis: tappa.Analysis) -> None:
    """Heads 0 and 1 read KV head 0, and so on."""
    heads = analysis.heads

    def groups(figure: str) -> list[list[list[float]]]:
        return [
            [[h[figure] for h in heads if (h["layer"], h["kv_head"]) == (n, k)] for k in range(3)]
            for n in range(2)
        ]

    def fixed(name: str, **options: Any) -> Any:
        return tappa.compressed(llama, name, 64, analysis=analysis, **options).fixed

    for name, options, figure in (
        ("tappa", {"exponent": 3.0, "per_head": True}, "q_similarity"),
        ("tappa", {"exponent": 3.0, "per_head": False}, "q_similarity"),
        ("tappa_paper", {}, "q_similarity_post_all_window"),
    ):
        found = fixed(name, **options)
        for layer, preferences in zip(groups(figure), found, strict=True):
            assert all(len(group) == 2 for group in layer)
            wanted = [1 - sum(group) / len(group) for group in layer]
            if not options.get("per_head"):
                wanted = [sum(wanted) / 3] * 3
            assert preferences == pytest.approx([w ** options.get("exponent", 1) for w in wanted])
    for layer, preferences in zip(groups("predictability"), fixed("duo_attention"), strict=True):
        assert preferences == pytest.approx([1 - min(group) for group in layer])
    assert fixed("snapkv") == [[1, 1, 1]] * 2


def test_only_full_layers_have_preferences() -> None:
    """Of the three layers of this model, two have a sliding window."""
    model = tiny_model("gemma3")
    known = tappa.analyze(model, tiny_tokenizer(), "Mary said that pride is common.", tokens=30)
    fixed = tappa.compressed(model, "tappa", 64, analysis=known, exponent=1.0).fixed
    assert fixed is not None
    mine = [1 - h["q_similarity"] for h in known.heads if h["layer"] == 2]
    assert fixed == [pytest.approx([sum(mine) / len(mine)] * 3)]


def test_options_may_be_in_the_name() -> None:
    inside = method_named("tappa(gamma=50.0, per_head=true)")
    assert inside.name == "tappa"
    assert inside.sharing == "heads"
    both = method_named("streaming_llm(sinks=2)", window=7)
    assert (both.name, both.sinks, both.window) == ("streaming_llm", 2, 7)
    with pytest.raises(
        CompressionError, match="the option 'sinks' of streaming_llm is given twice"
    ):
        method_named("streaming_llm(sinks=2)", sinks=3)
    assert method_named("snapkv+tappa(exponent=1.0)").name == "snapkv+tappa"
