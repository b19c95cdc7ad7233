"""A model on two GPUs, on paper: no operation mixes devices, and results are those on one GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import tappa
from gpus_on_paper import gpus_on_paper, place_of, spread
from tappa.compression import describe_methods, generate
from tappa.evaluation.samples import TextSample
from tappa.evaluation.shared_prefill import GridLM, cells_of
from tappa.pruning import calibrate
from tappa.report.looking import look
from tiny import tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession. " * 2
IDS = torch.arange(80)[None] * 7 % 90 + 5
ONE = {"": "cuda:0"}
TWO = ONE | dict.fromkeys(["model.layers.1", "model.layers.2", "model.norm", "lm_head"], "cuda:1")


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch, as_users_run_it: None) -> Iterator[None]:
    """Checks of shapes ask every tensor for its device and more, which takes long here."""
    with gpus_on_paper(monkeypatch):
        yield


def on(places: dict[str, str], kind: str = "llama", **changes: Any) -> PreTrainedModel:
    model = tiny_model(kind, **changes)
    if model.config.tie_word_embeddings:  # the same weights cannot lie in two places
        places = {name: place for name, place in places.items() if name != "lm_head"}
    return spread(model, places)


def both(compute: Callable[[PreTrainedModel], Any], kind: str = "llama") -> tuple[Any, Any]:
    """On two GPUs and on one."""
    return compute(on(TWO, kind)), compute(on(ONE, kind))


def test_mixing_devices_is_refused() -> None:
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
        a + b
    with pytest.raises(RuntimeError, match="cpu and cuda:1"):
        torch.cat([b, torch.ones(3)])
    assert place_of(torch.ones(3, device="cuda:0").to(b) + b) == b.device
    assert (b * torch.tensor(2.0))[torch.tensor([0])].device == b.device


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [None, 60])
def test_analysis(kind: str, chunk: int | None) -> None:
    def compute(model: PreTrainedModel) -> Any:
        return tappa.analyze(model, tiny_tokenizer(), TEXT, chunk=chunk)

    mine, theirs = both(compute, kind)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        for name, value in b.sums.items():
            np.testing.assert_array_equal(a.sums[name], value, err_msg=name)


def written(model: PreTrainedModel, method: str, budget: int | None) -> tuple[list, list]:
    """Ids, and the positions held, after a prompt and 12 new tokens."""
    cache = tappa.compressed(model, method, budget, every=5)
    ids = generate(cache, IDS, 12, graph=False)
    held = [cache.positions_held(layer, head) for layer in range(2) for head in range(3)]
    return ids.tolist(), held


@pytest.mark.parametrize("method", describe_methods())
def test_generation(method: str) -> None:
    budget = None if method == "full" else 40
    mine, theirs = both(lambda model: written(model, method, budget))
    assert mine == theirs


@pytest.mark.parametrize("method", ["tappa", "adakv", "h2o"])
def test_generation_by_transformers(method: str) -> None:
    """Rows of two lengths, with beams, inside `with`."""
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :7] = 0

    def compute(model: PreTrainedModel) -> list[list[int]]:
        ids, where = IDS.expand(2, -1).to("cuda:0"), mask.to("cuda:0")
        with tappa.compressed(model, method, 40, every=3):
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
            return model.generate(ids, attention_mask=where, **options).tolist()  # type: ignore[operator]

    mine, theirs = both(compute)
    assert mine == theirs


def test_an_evaluation() -> None:
    """One reading of a prompt for all cells, and a stack of their caches."""
    cells = cells_of(("full", "snapkv", "tappa", "h2o", "expected_attention"), (40, 64))

    def compute(model: PreTrainedModel) -> list[dict[str, Any]]:
        lm = GridLM(model, tiny_tokenizer())
        lm.cells = cells
        ids = IDS[0].tolist()
        return TextSample("fidelity", 0, ids[:66], ids[66:]).answers(lm, cells)

    mine, theirs = both(compute)
    assert mine == theirs


def test_a_calibration_and_pictures() -> None:
    def compute(model: PreTrainedModel) -> list[Any]:
        sums = calibrate(model, tiny_tokenizer(), TEXT, window=31)
        views = look(model, tiny_tokenizer(), TEXT, methods=("snapkv",))
        return [sums.cosines, sums.similarity, sums.output, views.maps, views.kept]

    for mine, theirs in zip(*both(compute), strict=True):
        np.testing.assert_array_equal(mine, theirs)
