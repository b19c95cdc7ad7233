"""What one sees of an object that is printed: one line that says what matters."""

from typing import Any

import pytest
import torch

import tappa
from tappa.cache_argument import with_cache
from tappa.checkpoint import LoadedModel
from tappa.compression import METHODS, Written, stack_caches
from tappa.compression.methods import method_named
from tappa.pruning import Amounts, Figures, Plan, Windows
from tappa.verification.results import Verified
from tappa.wording import byte_size, counted
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Any = make_tiny
IDS = torch.arange(3, 16)[None]  # 13 tokens
TEXT = "It is a truth universally acknowledged"  # 38 tokens
STREAMING: dict[str, Any] = {"method": "streaming_llm", "window": 3, "sinks": 2}
# a token of the tiny model: 2 layers, 3 KV heads, keys and values of 10 numbers, 4 bytes each
TOKEN = 480


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (6240, "6.2 kB")),
        *((999_949, "999.9 kB"), (999_950, "1.0 MB"), (11_600_000, "11.6 MB")),
        *((2_500_000_000, "2.5 GB"), (7_000_000_000_000_000, "7000.0 TB")),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert byte_size(count) == text


def test_counts() -> None:
    assert [counted(n, "token") for n in (0, 1, 2048)] == ["0 tokens", "1 token", "2,048 tokens"]


def test_an_analysis() -> None:
    model = tiny_model("llama")
    analysis = tappa.analyze(model, tiny_tokenizer(), [TEXT, TEXT[:29]])
    name = model.config._name_or_path or "LlamaForCausalLM"
    assert repr(analysis) == (f"<Analysis of {name}: 2 layers, 12 heads; 67 tokens in 2 prompts>")
    assert "\n" not in repr(analysis.layers[0])


def test_caches() -> None:
    model = tiny_model("llama")
    full = tappa.compressed(model, "full")
    assert repr(full) == "<CompressedCache of LlamaForCausalLM: full; nothing read>"
    model(IDS, **with_cache(model, full))
    assert repr(full) == (
        "<CompressedCache of LlamaForCausalLM: full; 13.0 of 13 tokens held, 6.2 kB>"
    )
    assert full.nbytes == 13 * TOKEN
    context = tappa.compress_context(model, IDS, budget=5, **STREAMING)
    held = "streaming_llm, budget 5; 5.0 of 13 tokens held, 2.4 kB"
    assert repr(context) == (
        f"<CompressedContext in <CompressedCache of LlamaForCausalLM: {held}>>"
    )
    both = stack_caches([context.cache(), context.cache()])
    assert "5.0 of 13 tokens held in 2 rows, 4.8 kB" in repr(both)


def test_a_recording() -> None:
    recording = tappa.record(tiny_model("llama"), IDS)
    # queries: 2 layers, 6 heads of 10 numbers
    assert repr(recording) == (
        "<Recording of LlamaForCausalLM: 13 tokens, 6.2 kB of keys and values, 6.2 kB of queries>"
    )


def test_what_is_written() -> None:
    written = Written("a\nb" * 20, 31, 7, 37, 5.0, 2400, 2880, 0, 17760, 1.0, 1.0)
    start = repr(("a\nb" * 20)[:40] + "...")
    assert repr(written) == f"<Written {start}: 7 tokens after 31; 5.0 of 37 held, 2.4 kB>"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_settings(name: str) -> None:
    method = method_named(name)
    assert repr(method).startswith(f"Method(window={method.window}, sinks={method.sinks}, ")
    assert f"name={name!r}" in repr(method)
    assert "function" not in repr(method)


def test_a_calibration_and_its_windows() -> None:
    model = tiny_model("llama")
    windows = Windows.of(model, tiny_tokenizer(), TEXT, window=17, stride=7)
    assert repr(windows) == "<4 windows of at most 17 tokens, one every 7>"
    found = tappa.calibrate(model, tiny_tokenizer(), TEXT, window=17, stride=7)
    name = found.model["name"]
    assert repr(found) == f"<Calibration of {name}: 2 layers, 12 heads; 68 tokens in 4 windows>"


def test_a_loaded_model() -> None:
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer())
    loaded.model.name_or_path = "my/model"
    assert repr(loaded) == (
        "<LoadedModel LlamaForCausalLM my/model, float32 on cpu; TokenizersBackend of 100 tokens>"
    )


def test_others_take_one_line() -> None:
    figures = Figures(7, 28, [1.0], 2.0, [0.5] * 1000, "cpu")
    found = [tappa.Settings(), Plan([1]), Amounts(layers=1), figures, Verified({"name": "m"}, 512)]
    for one in found:
        assert "\n" not in repr(one)
        assert len(repr(one)) < 300
