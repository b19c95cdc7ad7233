"""A model whose layers lie on several devices (device_map): everything as if it lay on one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

import tappa
from tappa.cache_argument import with_cache
from tappa.errors import ModelError
from tappa.models import LoadedModel
from tappa.pruning import calibrate
from tiny import save_tiny, tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession. " * 2
IDS = torch.arange(80)[None] * 7 % 90 + 5
PLACES = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm"]
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def check_analysis(mine: PreTrainedModel, theirs: PreTrainedModel, tolerance: float) -> None:
    first, second = (tappa.analyze(m, tiny_tokenizer(), TEXT) for m in (mine, theirs))
    for a, b in zip(first.layers, second.layers, strict=True):
        for name, value in b.sums.items():
            np.testing.assert_allclose(a.sums[name], value, tolerance, tolerance, err_msg=name)


def kept(model: PreTrainedModel) -> list[list[int]]:
    """Positions that two methods hold after a prompt and a step."""
    found = []
    for method in ("tappa", "snapkv"):
        cache = tappa.compressed(model, method, 40)
        with torch.inference_mode():
            model(IDS.to(model.device), **with_cache(model, cache))
            model(IDS[:, :1].to(model.device), **with_cache(model, cache))
        found += [cache.positions_held(layer, head) for layer in range(2) for head in range(3)]
    return found


def dispatched(places: dict[str, str], folder: Path) -> PreTrainedModel:
    """The tiny model with accelerate's hooks on all modules."""
    model = tiny_model("llama")
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    found: PreTrainedModel = dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    return found


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_hooks_that_move_tensors_change_nothing(tmp_path: Path, place: str) -> None:
    """`disk`: the weights of the second layer come only when it runs."""
    places = dict.fromkeys(PLACES, "cpu") | {"layers.1": place}
    model, whole = dispatched(places, tmp_path), tiny_model("llama")
    assert any(p.is_meta for p in model.parameters()) == (place == "disk")
    check_analysis(model, whole, tolerance=0.0)
    assert kept(model) == kept(whole)
    if place == "cpu":
        mine, theirs = (calibrate(m, tiny_tokenizer(), TEXT, window=31) for m in (model, whole))
        np.testing.assert_array_equal(mine.output, theirs.output)


def test_all_on_a_machine_without_gpus_is_the_cpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    spread = tappa.load(folder, device="all").model
    whole: Any = tappa.load(folder, device="cpu").model
    check_analysis(spread, whole.to(spread.device), tolerance=1e-4)


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    offloaded: Any = tiny_model("llama")
    lent = LoadedModel(offloaded.to("meta"), tiny_tokenizer())
    monkeypatch.setattr("tappa.models.load_folder", lambda *arguments: lent)
    with pytest.raises(ModelError, match="does not fit"):
        tappa.load(folder, device="all")


@needs_two_gpus
def test_layers_on_two_gpus(tmp_path: Path) -> None:
    """Whatever "all" would do with so small a model, its layers are put on two devices."""
    model, whole = tiny_model("llama"), tiny_model("llama").to("cuda:0")  # type: ignore[arg-type]
    device_map = {f"model.{name}": 0 for name in PLACES} | {"model.layers.1": 1, "lm_head": 1}
    spread = dispatch_model(model, device_map)
    check_analysis(spread, whole, tolerance=1e-4)
    assert kept(spread) == kept(whole)
    mine, theirs = (calibrate(m, tiny_tokenizer(), TEXT, window=31) for m in (spread, whole))
    np.testing.assert_allclose(mine.output, theirs.output, rtol=1e-4)
