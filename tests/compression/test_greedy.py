"""Greedy text is written, whatever a model's generation_config.json asks for."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from tappa.compression import compressed, takes_over, write_on
from tappa.compression.greedy import greedy_arguments, kept, left_out
from tappa.models import load
from tiny import change_json, save_tiny, save_tiny_gguf, tiny_model, tiny_tokenizer

PROMPT = "Vanity and pride are different things, Mary said, though often confused. " * 2
NEW = 21

# what changes no greedy text, or only how it is computed or handed over
SILENT: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
    {"cache_implementation": "static"},
    {"cache_implementation": "quantized"},
    {"return_dict_in_generate": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"prefill_chunk_size": 16},
    {"use_cache": False},
    {"max_length": 30},
    {"chat_format": "of another program"},
]
# what asks for other text than greedy one
TOLD: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "low"},
    {"token_healing": True},
]


def asking(**wanted: Any) -> Any:
    """A model whose generation config asks for something."""
    model = tiny_model("llama")
    for name, value in wanted.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.fixture(scope="module")
def greedy() -> str:
    return write_on(compressed(tiny_model("llama"), "full"), tiny_tokenizer(), PROMPT, NEW).text


@pytest.mark.parametrize("wanted", SILENT, ids=lambda wanted: "+".join(wanted))
@pytest.mark.parametrize("method", ["full", "tappa"])
def test_settings_that_change_no_greedy_text(wanted: dict[str, Any], method: str) -> None:
    tokenizer = tiny_tokenizer()
    expected, found = (
        write_on(compressed(model, method, 64), tokenizer, PROMPT, NEW)
        for model in (tiny_model("llama"), asking(**wanted))
    )
    assert found.text == expected.text
    assert found.tokens_seen == len(PROMPT) + NEW - 1
    assert found.tokens_held == expected.tokens_held


@pytest.mark.parametrize("wanted", TOLD, ids=lambda wanted: "+".join(wanted))
def test_settings_that_ask_for_other_text_are_left_out_and_told(
    wanted: dict[str, Any], greedy: str
) -> None:
    model = asking(**wanted)
    with pytest.warns(UserWarning, match="which is left out: text is greedy here") as warned:
        written = write_on(compressed(model, "full"), tiny_tokenizer(), PROMPT, NEW)
    assert written.text == greedy
    assert len(warned) == 1
    assert all(name in str(warned[0].message) for name in left_out(model))
    assert takes_over(model, graph=True)  # on a GPU the same text is written


def test_text_ends_with_a_string_to_stop_at(tmp_path: Path, cache: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load(tmp_path / "tiny.gguf")
    text = write_on(compressed(model, "full"), tokenizer, PROMPT, NEW).text
    assert len(text) > 12
    model.generation_config.stop_strings = [text[3:5]]
    written = write_on(compressed(model, "full"), tokenizer, PROMPT, NEW)
    assert written.text == text[: text.index(text[3:5]) + 2]
    assert kept(model) == ["stop_strings"]


def test_settings_that_choose_tokens_are_kept(greedy: str) -> None:
    tokenizer = tiny_tokenizer()
    first = tokenizer(greedy[0]).input_ids[0]
    for wanted in ({"suppress_tokens": [first]}, {"bad_words_ids": [[first]]}):
        text = write_on(compressed(asking(**wanted), "full"), tokenizer, PROMPT, NEW).text
        assert greedy[0] not in text
    model = asking(no_repeat_ngram_size=1)
    text = write_on(compressed(model, "full"), tokenizer, PROMPT, 9).text
    assert len(set(text.split())) == len(text.split()) > 5


def test_guidance_asks_the_model_beside_the_cache() -> None:
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    model: Any = asking(guidance_scale=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own name for its cache
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        written = write_on(compressed(model, "full"), tiny_tokenizer(), PROMPT, 9)
    assert written.text == tiny_tokenizer().decode(expected, skip_special_tokens=True)


def test_a_generation_config_on_disk(tmp_path: Path, greedy: str) -> None:
    folder = save_tiny(tmp_path / "model")
    wanted = {"num_beams": 3, "cache_implementation": "static", "return_dict_in_generate": True}
    change_json(folder / "generation_config.json", **wanted)
    model, tokenizer = load(folder)
    with pytest.warns(UserWarning, match="num_beams, which is left out"):
        assert write_on(compressed(model, "full"), tokenizer, PROMPT, NEW).text == greedy
    arguments = greedy_arguments(model, tokenizer)
    assert arguments == dict.fromkeys(wanted) | {"num_beams": 1, "return_dict_in_generate": False}


def test_a_model_without_a_generation_config(greedy: str) -> None:
    model = tiny_model("llama")
    assert kept(model) == left_out(model) == []
    model.generation_config = None  # type: ignore[assignment]
    assert greedy_arguments(model, tiny_tokenizer()) == {}


def test_sampled_text_is_drawn_as_the_config_says() -> None:
    model = asking(do_sample=True, top_k=5, num_beams=2)
    assert set(greedy_arguments(model, tiny_tokenizer())) == {"do_sample", "top_k", "num_beams"}
    assert set(greedy_arguments(model, tiny_tokenizer(), sampled=True)) == {"num_beams"}
