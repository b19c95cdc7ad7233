"""Layers with KV heads or head sizes of their own, and layers that read others' keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import tappa
from tappa.capture import LayerView, prefill
from tappa.errors import PruningError
from tappa.pruning import Windows, calibrate_on, silence_heads
from tappa.pruning.layers import layers_removed, remove_layers
from tappa.texts import packaged_text
from tappa.verification.verify import Verification, verify
from tiny import COMMON, tiny_tokenizer

if not hasattr(transformers, "Gemma4TextConfig"):
    pytest.skip("this transformers has no Gemma 4", allow_module_level=True)

TOKENS = 61
IDS = torch.randint(3, 101, (1, TOKENS), generator=torch.Generator().manual_seed(0))
SHARED: dict[str, Any] = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
OWN: dict[str, Any] = {
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
both = pytest.mark.parametrize("changes", [SHARED, OWN], ids=["shared", "own"])


def gemma4(changes: dict[str, Any]) -> PreTrainedModel:
    settings: dict[str, Any] = {
        **{**COMMON, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 10},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 17},
        **{"global_head_dim": 14, "vocab_size_per_layer_input": 101, **changes},
    }
    config = transformers.Gemma4TextConfig(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def views_of(model: PreTrainedModel, **options: Any) -> list[LayerView]:
    views: list[LayerView] = []
    prefill(model, IDS, views.append, **options)
    return views


def attention_from(view: LayerView) -> torch.Tensor:
    keys = view.keys.repeat_interleave(len(view.queries) // len(view.keys), 0)
    rows, columns = torch.arange(view.queries.shape[1]), torch.arange(keys.shape[1])
    logits = view.attention.logits(view.queries, keys.mT)
    return logits.masked_fill(~view.attention.visible(rows, columns), -torch.inf).softmax(-1)


@both
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_every_layer_shows_all_its_queries(changes: dict[str, Any], kept: int) -> None:
    """Also where only the last logits are asked for, which lets layers leave out the others."""
    model = gemma4(changes)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        out = model(IDS, output_attentions=True)
    views: list[LayerView] = []
    logits = prefill(model, IDS, views.append, logits_to_keep=kept)
    torch.testing.assert_close(logits, out.logits[:, -kept:], atol=1e-4, rtol=1e-4)
    assert [view.layer for view in views] == [0, 1, 2, 3]
    for view, expected in zip(views, out.attentions, strict=True):
        torch.testing.assert_close(attention_from(view), expected[0], atol=1e-5, rtol=1e-5)


@both
def test_head_sizes_and_kv_heads_are_those_of_the_layer(changes: dict[str, Any]) -> None:
    views = views_of(gemma4(changes))
    assert [view.queries.shape[-1] for view in views] == [10, 14, 10, 14]
    assert [len(view.keys) for view in views] == ([3, 1, 3, 1] if changes is OWN else [3] * 4)


@both
def test_analysis_is_read_back_and_the_same_in_chunks(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = gemma4(changes), tiny_tokenizer()
    found = tappa.analyze(model, tokenizer, packaged_text(), tokens=TOKENS)
    assert found.model["kv_heads"] == ([3, 1, 3, 1] if changes is OWN else 3)
    assert found.summary()["bound_violations"] == 0
    read = tappa.Analysis.load(found.save(tmp_path / "analysis.json"))
    assert read.model == found.model
    assert read.heads == found.heads
    assert len(read.merge(found).heads) == 24
    chunked = tappa.analyze(model, tokenizer, packaged_text(), tokens=TOKENS, chunk=23)
    for one, other in zip(found.heads, chunked.heads, strict=True):
        assert one["kv_head"] == other["kv_head"]
        assert other["q_similarity"] == pytest.approx(one["q_similarity"], abs=1e-4)


def calibrated(model: PreTrainedModel) -> tappa.Calibration:
    windows = Windows.of(model, tiny_tokenizer(), packaged_text(), window=40, stride=40, limit=2)
    return calibrate_on(model, windows)


def test_layers_with_sizes_of_their_own_can_be_removed(tmp_path: Path) -> None:
    model = gemma4(OWN)
    remove_layers(model, [1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert again.config.num_hidden_layers == 3


@pytest.mark.parametrize("changes", [{}, {"global_head_dim": 10}])
def test_a_config_that_makes_another_kind_of_a_layer_is_refused(changes: dict[str, Any]) -> None:
    """The last layer of Gemma 4 is one of full attention, whatever its config is told."""
    model = gemma4({**OWN, "num_global_key_value_heads": 3, **changes})
    with pytest.raises(PruningError, match="makes layer_types"):
        remove_layers(model, [3])


def test_a_model_without_such_a_layer_for_a_while_is_whole_afterwards() -> None:
    model = gemma4(OWN)
    before, logits = model.config.to_dict(), model(IDS).logits
    with layers_removed(model, [1]):
        assert not torch.equal(model(IDS).logits, logits)
    assert model.config.to_dict() == before
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(
    ("changes", "amounts", "message"),
    [
        (SHARED, {"layers": 1}, "read the keys and values of earlier ones"),
        ({**OWN, "hidden_size_per_layer_input": 8}, {"layers": 1}, "embeddings for each layer"),
        (SHARED, {"kv_groups": 1}, "expected k_proj"),
        (OWN, {"kv_groups": 1}, "equally many KV heads in all layers, got 1 to 3"),
    ],
)
def test_what_cannot_be_removed_is_said_and_nothing_is_altered(
    changes: dict[str, Any], amounts: dict[str, Any], message: str
) -> None:
    model = gemma4(changes)
    known, logits = calibrated(model), model(IDS).logits
    with pytest.raises(PruningError, match=message):
        tappa.prune(model, known, **amounts)
    assert torch.equal(model(IDS).logits, logits)


def test_a_silenced_head_is_cut_out_in_the_width_of_its_layer() -> None:
    model = gemma4(OWN)
    silence_heads(model, [(0, 2), (1, 5)])
    narrow, wide = (
        model.get_parameter(f"model.layers.{n}.self_attn.o_proj.weight") for n in range(2)
    )
    assert (narrow == 0).all(0).nonzero()[:, 0].tolist() == list(range(20, 30))
    assert (wide == 0).all(0).nonzero()[:, 0].tolist() == list(range(70, 84))


@both
def test_claims_are_checked_as_far_as_the_model_lets_us(changes: dict[str, Any]) -> None:
    wanted = Verification(claims=["bounds", "relocation", "base"], tokens=100, count=4)
    found = verify(gemma4(changes), tiny_tokenizer(), wanted, texts={"prose": packaged_text()})
    assert found.bounds
    assert all("untestable" in note for note in found.notes)
