from typing import Any

import pytest
import torch

from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression import check_method, compressed, parse_budget, takes_over, write_on
from tappa.errors import CompressionError, NonFiniteError, TextError
from tiny import tiny_model, tiny_tokenizer

PROMPT = "Vanity and pride are different things, Mary said, though often confused. " * 2
SMALL: dict[str, Any] = {"window": 7}


def test_what_is_written_is_what_generate_writes() -> None:
    """Of a full cache; and its pieces, as they are shown, make up the text."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pieces: list[str] = []
    with watched(model) as seen:
        written = write_on(compressed(model, "full"), tokenizer, PROMPT, 11, show=pieces.append)
    seen.check_clear()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    generate: Any = model.generate
    expected = generate(ids, max_new_tokens=11, do_sample=False)[0, ids.shape[1] :]
    assert written.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == written.text
    assert (written.prompt_tokens, written.new_tokens) == (len(PROMPT), len(expected))
    assert written.tokens_seen == written.tokens_held == len(PROMPT) + len(expected) - 1
    token = 2 * 4 * 10 * 3 * 2  # bytes of keys and values: 10 floats, 3 KV heads, 2 layers
    assert written.nbytes == written.full_nbytes == token * written.tokens_seen
    assert written.prefill_seconds > 0
    assert written.decode_seconds > 0


@pytest.mark.parametrize("new", [1, 2, 37])
def test_fixed_steps_write_the_same(new: int) -> None:
    """As on a GPU: a few tokens at a time are shown, up to the one that ends the text."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found, pieces = [], []
    for graph in (None, True):
        shown: list[str] = []
        cache = compressed(model, "tappa", 23, every=4, **SMALL)
        with watched(model) as seen:
            found.append(write_on(cache, tokenizer, PROMPT, new, show=shown.append, graph=graph))
        seen.check_clear()
        pieces.append("".join(shown))
    for name in ("text", "prompt_tokens", "new_tokens", "tokens_seen", "tokens_held", "nbytes"):
        assert getattr(found[1], name) == getattr(found[0], name)
    assert pieces[0] == pieces[1] == found[0].text
    assert found[1].peak_nbytes >= found[0].peak_nbytes  # with a copy in buffers, from 2 tokens on
    assert found[1].prefill_seconds > 0
    assert found[1].decode_seconds > 0


def test_a_model_that_penalizes_repetition_is_left_to_transformers() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.update(repetition_penalty=1.0, temperature=0.6, top_k=20)
    assert takes_over(model, graph=True)
    assert not takes_over(model)  # on a CPU
    free = write_on(compressed(model, "full"), tokenizer, PROMPT, 23).text
    model.generation_config.repetition_penalty = 5.0
    with pytest.raises(CompressionError, match="config asks for repetition_penalty"):
        write_on(compressed(model, "full"), tokenizer, PROMPT, 23, graph=True)
    assert write_on(compressed(model, "full"), tokenizer, PROMPT, 23).text != free


def test_memory_of_a_compressed_cache() -> None:
    model = tiny_model("llama")
    cache = compressed(model, "snapkv", 23, every=4, **SMALL)
    written = write_on(cache, tiny_tokenizer(), PROMPT, 9)
    token = 2 * 4 * 10 * 3 * 2
    assert written.nbytes == token * written.tokens_held
    assert 23 - 4 <= written.tokens_held <= 23
    assert written.full_nbytes == token * written.tokens_seen
    layer = token // 2 * len(PROMPT)
    assert layer <= written.peak_nbytes <= layer + token * 23


def test_one_new_token_has_no_decode_time_to_speak_of() -> None:
    written = write_on(compressed(tiny_model("llama"), "full"), tiny_tokenizer(), PROMPT, 1)
    assert written.new_tokens == 1
    assert written.tokens_seen == len(PROMPT)


def test_a_chat_template_is_used() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(TextError, match="chat template"):
        write_on(compressed(model, "full"), tokenizer, PROMPT, 3, chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    written = write_on(compressed(model, "full"), tokenizer, "Hello", 3, chat=True)
    assert written.prompt_tokens == len("[Hello]>")


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ("", 5, "at least 1 token"),
        (PROMPT, 0, "at least 1 new token, got 0"),
        (PROMPT, 400, f"{len(PROMPT)} tokens and 400 new ones are more than .* of 512 tokens"),
    ],
)
def test_prompts_that_cannot_work(prompt: str, new: int, message: str) -> None:
    model = tiny_model("llama")
    cache = compressed(model, "full")
    with pytest.raises(TextError, match=message):
        write_on(cache, tiny_tokenizer(), prompt, new)
    assert cache.tokens_seen == 0


@pytest.mark.parametrize(
    ("text", "budget"), [("512", 512), ("0.1", 0.1), ("1", 1), ("1.0", 1.0), ("-3", -3)]
)
def test_budgets_in_text(text: str, budget: float) -> None:
    assert parse_budget(text) == budget
    assert type(parse_budget(text)) is type(budget)


@pytest.mark.parametrize("text", ["", "many", "10%", "1/2", "0x10"])
def test_text_that_is_no_budget(text: str) -> None:
    with pytest.raises(CompressionError, match="a budget such as 512"):
        parse_budget(text)


def test_methods_are_checked_without_a_model() -> None:
    assert check_method("snapkv", 64)[1] == 64
    assert check_method("full", None)[1] is None
    with pytest.raises(CompressionError, match="did you mean 'snapkv'"):
        check_method("snapk", 64)
    with pytest.raises(CompressionError, match="at least 32 tokens"):
        check_method("snapkv", 31)


def test_bytes_of_all_tokens_do_not_depend_on_what_is_held() -> None:
    model = tiny_model("gemma3")
    ids = torch.arange(3, 64)[None]
    caches = [
        compressed(model, name, 23, **options)
        for name, options in (("full", {}), ("snapkv", SMALL))
    ]
    for cache in caches:
        model(ids, **with_cache(model, cache))
    assert caches[0].full_nbytes == caches[0].nbytes == caches[1].full_nbytes > caches[1].nbytes


@pytest.mark.parametrize("graph", [None, True])
def test_nan_weights_write_nothing(graph: bool | None) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN among the logits"):
        write_on(compressed(model, "tappa", 23, **SMALL), tokenizer, PROMPT, 5, graph=graph)
