"""Models saved with `use_cache: false` read, keep and write what they would without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import compressed, write_on
from tappa.evaluation.harness import TappaLM
from tappa.evaluation.shared_prefill import Cell, GridLM
from tappa.models import load
from tiny import change_json, save_tiny, tiny_model, tiny_tokenizer

PROMPT = "Vanity and pride are different things, Mary said, though often confused. " * 2
SMALL: dict[str, Any] = {"window": 7}
KINDS = ["llama", "gemma3", "phi3", "gpt_neox", "cohere"]
NEW = {"max_new_tokens": 9, "do_sample": False}


def saved_without_cache(folder: Path, kind: str) -> Any:
    """As training leaves it: `use_cache` is false in both files."""
    save_tiny(folder, kind)
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, use_cache=False)
    model = load(folder).model
    assert model.config.use_cache is model.generation_config.use_cache is False
    return model


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model, and the same one saved without a cache."""
    return tiny_model(request.param), saved_without_cache(tmp_path / "model", request.param)


def ids() -> torch.Tensor:
    return torch.tensor([tiny_tokenizer()(PROMPT).input_ids])


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_text_is_written(pair: tuple[Any, Any], method: str) -> None:
    options = SMALL if method == "snapkv" else {}
    found = [
        write_on(compressed(model, method, 23, **options), tiny_tokenizer(), PROMPT, 9)
        for model in pair
    ]
    for name in ("text", "new_tokens", "tokens_seen", "tokens_held", "nbytes"):
        assert getattr(found[0], name) == getattr(found[1], name)
    fixed = write_on(compressed(pair[1], "full"), tiny_tokenizer(), PROMPT, 9, graph=False)
    assert fixed.tokens_seen == len(PROMPT) + 8


def test_generate_and_with(pair: tuple[Any, Any]) -> None:
    texts, held = [], []
    for model in pair:
        cache = compressed(model, "snapkv", 23, **SMALL)
        texts.append(model.generate(ids(), **with_cache(model, cache), **NEW))
        with compressed(model, "snapkv", 23, **SMALL) as inside:
            texts.append(model.generate(ids(), **NEW))
        texts.append(tappa.compression.generate(compressed(model, "snapkv", 23, **SMALL), ids(), 9))
        held += [cache.tokens_held(), inside.tokens_held()]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert set(held) == {held[0]}
    assert held[0] <= 23


@pytest.mark.same_kernel
def test_a_context_and_a_recording(pair: tuple[Any, Any]) -> None:
    found = []
    for model in pair:
        context = tappa.compress_context(model, ids(), "snapkv", 23, chunk=40, **SMALL)
        [recorded] = tappa.record(model, ids()).compress("snapkv", [23], **SMALL)
        logits = [
            model(torch.tensor([[5]]), **with_cache(model, cache)).logits
            for cache in (context.cache(), recorded)
        ]
        found.append((context.nbytes, recorded.nbytes, *logits))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2:], found[1][2:])


@pytest.mark.same_kernel
def test_lm_eval(pair: tuple[Any, Any]) -> None:
    answers = []
    for model in pair:
        lm = TappaLM(model, "snapkv", 23, tokenizer=tiny_tokenizer(), window=7)
        written = lm._model_generate(ids(), ids().shape[1] + 9, ["</s>"])
        scored = lm._loglikelihood_tokens(
            [(None, ids()[0].tolist(), [5, 9, 17])], disable_tqdm=True
        )
        grid = GridLM(model, tiny_tokenizer())
        grid.cells = grid.now = [Cell("snapkv(window=7)", 23)]
        grid_scored = grid._loglikelihood_tokens(
            [(None, ids()[0].tolist(), [5, 9, 17])], disable_tqdm=True
        )
        answers.append((written.tolist(), scored[0][0], grid_scored[0][0]))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1:] == pytest.approx(answers[1][1:])


def test_analysis(pair: tuple[Any, Any]) -> None:
    frames = [
        tappa.analyze(model, tiny_tokenizer(), PROMPT, tokens=64).to_frame() for model in pair
    ]
    assert frames[0].equals(frames[1])


def test_the_command(tmp_path: Path, run: Any) -> None:
    saved_without_cache(tmp_path / "model", "llama")
    save_tiny(tmp_path / "other")
    shown = [
        json.loads(run("generate", folder, "--prompt", PROMPT, "--budget", 64, "--json")[1])
        for folder in (tmp_path / "model", tmp_path / "other")
    ]
    for name in ("text", "tokens_seen", "tokens_held", "nbytes"):
        assert shown[0][name] == shown[1][name]
