"""Whatever an analysis writes can be read back, on every kind of model that it accepts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tappa import Analysis, analyze
from tappa.capture import prefill
from tappa.errors import ModelError, NonFiniteError
from tappa.interface import attention_of
from tappa.report.content import content_of
from tiny import GROUPED, ROPE_KINDS, tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. "
SLIDING = ["sliding_attention", "full_attention"]
# layers without RoPE among others, and all of them without; a partial one; latent attention
FURTHER: dict[str, dict[str, Any]] = {
    "cohere2": {"layer_types": SLIDING, "sliding_window": 17},
    "exaone4": {"layer_types": SLIDING, "sliding_window": 17},
    "smollm3": {"no_rope_layers": [1, 0]},
    "smollm3-nowhere": {"no_rope_layers": [0, 0]},
    "stablelm": {"hidden_size": 60},
    "deepseek_v3": {
        **{"q_lora_rank": 12, "kv_lora_rank": 14, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6},
        **{"v_head_dim": 10, "head_dim": 8, "num_key_value_heads": 6, "n_routed_experts": 4},
        **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    },
    "minimax": {
        **{"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
        **{"hidden_size": 48, "intermediate_size": 64},
    },
}


def model_of(kind: str) -> PreTrainedModel:
    if kind not in FURTHER:
        return tiny_model(kind)
    settings: dict[str, Any] = {**GROUPED, **FURTHER[kind]}
    config = AutoConfig.for_model(kind.partition("-")[0], **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def check_read_back(found: Analysis, folder: Path) -> None:
    """Every figure and every sum, with the shapes that sums have."""
    file = found.save(folder / "analysis.json")
    read = Analysis.load(file)
    assert (read.model, read.prompts, read.settings) == (found.model, found.prompts, found.settings)
    assert read.heads == found.heads
    for mine, theirs in zip(found.layers, read.layers, strict=True):
        assert (mine.layer, mine.theta, mine.scale) == (theirs.layer, theirs.theta, theirs.scale)
        for name, array in mine.sums.items():
            assert array.shape == theirs.sums[name].shape, name
            assert np.array_equal(array, theirs.sums[name]), name
    both = read.merge(found)
    assert both.summary()["bounds_checked"] == 2 * found.summary()["bounds_checked"]
    assert len(Analysis.load(both.save(folder / "both.json")).heads) == len(found.heads)
    assert content_of([file])


@pytest.mark.parametrize("kind", [*ROPE_KINDS, *FURTHER])
def test_what_is_written_is_read_back(kind: str, tmp_path: Path) -> None:
    check_read_back(analyze(model_of(kind), tiny_tokenizer(), TEXT), tmp_path)


@pytest.mark.parametrize("kind", list(FURTHER))
def test_chunks_give_the_same_similarity(kind: str) -> None:
    """Also where the cache is one of the model's own."""
    whole, chunked = (
        analyze(model_of(kind), tiny_tokenizer(), TEXT, chunk=chunk) for chunk in (None, 29)
    )
    for one, other in zip(whole.heads, chunked.heads, strict=True):
        assert other["q_similarity"] == pytest.approx(one["q_similarity"], abs=1e-4)


def altered(name: str, factor: float) -> PreTrainedModel:
    """Qwen 3 with a tensor of its second layer multiplied."""
    model = tiny_model("qwen3")
    model.get_parameter(f"model.layers.1.self_attn.{name}.weight").data.mul_(factor)
    return model


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "q_norm", "k_norm"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-19, 1e9])
def test_dead_weak_and_strong_heads_violate_no_bound(
    name: str, value: float, tmp_path: Path
) -> None:
    found = analyze(altered(name, value), tiny_tokenizer(), TEXT)
    assert found.summary()["bound_violations"] == 0
    check_read_back(found, tmp_path)


def test_figures_too_large_for_a_number_are_told_at_once() -> None:
    with pytest.raises(NonFiniteError, match=r"layer 1: .* too large"):
        analyze(altered("q_norm", 1e36), tiny_tokenizer(), TEXT)


def test_a_layer_of_linear_attention_is_passed_over() -> None:
    layers = []
    ids = torch.randint(3, 101, (1, 37), generator=torch.Generator().manual_seed(0))
    prefill(model_of("minimax"), ids, lambda view: layers.append(view.layer))
    assert layers == [1]


@pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "indices", "block_indices"])
def test_attention_of_another_kind_is_refused_by_name(name: str) -> None:
    query = torch.zeros(1, 6, 37, 10)
    assert attention_of(torch.nn.Identity(), query, {name: None}).scale == 10**-0.5
    with pytest.raises(ModelError, match=name):
        attention_of(torch.nn.Identity(), query, {name: torch.zeros(1)})
