"""A model read from a GGUF file is the model that was written, on every architecture."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gguf_writing import write_gguf
from loading import PROMPT
from tappa.gguf_files import read_header
from tappa.gguf_files.rope import frequencies
from tappa.models import load

THETA = {"rope_theta": 3000.0}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SLIDES = ["sliding_attention"] * 5 + ["full_attention"]


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    """A model with random norms and biases."""
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


# architecture: kind of transformers, changes of its config, keys that _keys does not write
Row = tuple[str, dict[str, Any], dict[str, Any]]
LAYER_NORM = {"attention.layer_norm_epsilon": 3e-4}
PLAIN = {**THETA, "rope_type": "default"}
MODELS: dict[str, Row] = {
    "llama": ("llama", {"rope_parameters": PLAIN, "rms_norm_eps": 1e-3, "head_dim": 8}, {}),
    "llama, wide heads": ("llama", {"rope_parameters": PLAIN, "head_dim": 10}, {}),
    "llama, one KV head a query head": ("llama", {"num_key_value_heads": 6}, {}),
    "qwen2": ("qwen2", {"rope_parameters": PLAIN}, {}),
    "qwen3": ("qwen3", {"head_dim": 12, "rope_parameters": PLAIN}, {}),
    "qwen3moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"norm_topk_prob": True, "head_dim": 12},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
    ),
    "phi3": (
        "phi3",
        {"sliding_window": 9, "rope_parameters": PLAIN},
        {"attention.sliding_window": 9, "rope.dimension_count": 8},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        {"attention.sliding_window": 5, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 6, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5}
        | {"layer_types": SLIDES}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {**THETA, "rope_type": "linear", "factor": 8.0},
            }
        },
        {"attention.sliding_window": 5, "rope.freq_base": 3000.0}
        | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "use_qkv_bias": True}
        | {"layer_norm_eps": 3e-4},
        {"rope.dimension_count": 4, **LAYER_NORM},
    ),
    "starcoder2": ("starcoder2", {"rope_parameters": PLAIN, "norm_epsilon": 3e-4}, LAYER_NORM),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_read_is_the_model_written(tmp_path, cache, name):
    kind, changes, keys = MODELS[name]
    path = tmp_path / "model.gguf"
    original = write_gguf(path, model_of(kind, **changes), name.split(",")[0], keys)
    model, _ = load(path)
    assert (model(PROMPT).logits - original(PROMPT).logits).abs().max() < 1e-5


ROPE: dict[str, Row] = {
    "linear": (
        "llama",
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear, as it was": (
        "llama",
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scale_linear": 4.0},
    ),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        | {"rope.scaling.original_context_length": 128},
    ),
    "yarn with all its keys": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.7},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        | {"rope.scaling.original_context_length": 128, "rope.scaling.yarn_beta_fast": 16.0}
        | {"rope.scaling.yarn_beta_slow": 2.0}
        | {"rope.scaling.attn_factor": 1.7 / (0.1 * float(np.log(4)) + 1)},
    ),
    "none": ("llama", {"rope_type": "default"}, {"rope.scaling.type": "none"}),
}


@pytest.mark.parametrize("name", ROPE)
def test_scaling_by_keys_is_applied(tmp_path, cache, name):
    kind, parameters, keys = ROPE[name]
    path = tmp_path / "model.gguf"
    original = write_gguf(path, model_of(kind, rope_parameters={**THETA, **parameters}), kind, keys)
    model, _ = load(path)
    assert (model(PROMPT).logits - original(PROMPT).logits).abs().max() < 1e-5
    assert model.config.rope_parameters["rope_type"] == parameters["rope_type"]
    wanted = frequencies(read_header(path), 8)
    assert original.model.rotary_emb.inv_freq.tolist() == pytest.approx(wanted, rel=1e-5)


def llama3(**parameters: Any) -> PreTrainedModel:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **parameters}
    return model_of("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)


@pytest.mark.parametrize(
    "parameters",
    [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 7.5}
        | {"original_max_position_embeddings": 4096},
    ],
)
def test_divisors_of_frequencies_become_the_parameters_of_llama3(tmp_path, cache, parameters):
    original = llama3(**parameters)
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    divisors = plain / original.model.rotary_emb.inv_freq
    path = tmp_path / "model.gguf"
    write_gguf(path, original, "llama", tensors={"rope_freqs.weight": divisors.float().numpy()})
    model, _ = load(path)
    found = dict(model.config.rope_parameters)
    assert found.pop("rope_type") == "llama3"
    assert found == pytest.approx({"rope_theta": 500000.0, **parameters}, rel=1e-4)
    ratio = model.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    assert (ratio - 1).abs().max() < 1e-6


def test_other_divisors_of_frequencies_are_kept_as_they_are(tmp_path, cache):
    original = model_of("llama")
    divisors = np.array([1.0, 3.0, 2.0, 7.0], np.float32)
    path = tmp_path / "model.gguf"
    write_gguf(path, original, "llama", tensors={"rope_freqs.weight": divisors})
    model, _ = load(path)
    wanted = original.model.rotary_emb.inv_freq / torch.tensor(divisors)
    assert torch.allclose(model.model.rotary_emb.inv_freq, wanted, rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == 1
    model(torch.arange(3, 73)[None])
    assert torch.allclose(model.model.rotary_emb.inv_freq, wanted, rtol=1e-6)


def test_factors_of_longrope_are_applied(tmp_path, cache):
    short, long = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, **THETA}
    rope |= {"original_max_position_embeddings": 64, "factor": 8.0, "attention_factor": 1.25}
    original = model_of("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    factors = {"short": short, "long": long}
    path = tmp_path / "model.gguf"
    write_gguf(
        path,
        original,
        "phi3",
        {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25},
        {f"rope_factors_{n}.weight": np.array(f, np.float32) for n, f in factors.items()},
    )
    model, _ = load(path)
    for length in (40, 90):  # the long factors serve what is longer than the original context
        prompt = torch.arange(length)[None] % 90
        assert (model(prompt).logits - original(prompt).logits).abs().max() < 1e-5


def test_biases_that_the_class_leaves_off_are_switched_on(tmp_path, cache):
    path = tmp_path / "model.gguf"
    original = write_gguf(path, model_of("llama", attention_bias=True, mlp_bias=True), "llama")
    model, _ = load(path)
    assert (model(PROMPT).logits - original(PROMPT).logits).abs().max() < 1e-5


def test_what_llama_cpp_takes_for_granted_where_keys_are_missing(tmp_path, cache):
    """As many KV heads as heads, base 10,000, no sliding window: not the defaults of classes."""
    missing = dict.fromkeys(("attention.head_count_kv", "rope.freq_base", "vocab_size"))
    path = tmp_path / "model.gguf"
    changes = {"num_key_value_heads": 6, "rope_parameters": {**PLAIN, "rope_theta": 10000.0}}
    original = write_gguf(path, model_of("qwen2", **changes), "qwen2", missing)
    model, _ = load(path)
    assert (model(PROMPT).logits - original(PROMPT).logits).abs().max() < 1e-5


def test_layers_that_slide_by_a_pattern(tmp_path, cache):
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for number, pattern in enumerate([3, [True, True, False, True]]):
        path = tmp_path / f"{number}.gguf"
        original = model_of("gemma3_text", num_hidden_layers=4, head_dim=12, sliding_window=5)
        keys = {"attention.sliding_window": 5, "attention.sliding_window_pattern": pattern}
        write_gguf(path, original, "gemma3", {**keys, "rope.freq_base": 10000.0})
        assert load(path).model.config.layer_types == types
