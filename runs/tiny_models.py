"""A tiny random model of any causal architecture that transformers has."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 101
LAYERS = 4
MOST = 20_000_000  # parameters: above, some size was not found
# What sizes are called in configs. Each is set where a config has an entry of that name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 16
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "inner_dim"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 32
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 32),
    **{"global_head_dim": 32, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64},
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "lru_width"), 16),
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
# What single architectures need beside or in place of that.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(SLIDING)
        },
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note_text": {"shared_experts_intermediate_size": 32},
    "gemma3n_text": {"layer_types": SLIDING, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": SLIDING, "num_kv_shared_layers": 2},
    "granitemoehybrid": {"layer_types": LINEAR, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "num_layers": 2,
    },
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_kv_heads"), 2),
        **{"indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4},
        **{"ple_embed_dim": 16, "ngram_vocab_size_base": 101, "hc_lowrank": 8},
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"use_mem_rope": True, "hybrid_layer_ids": [1, 3], "attention_hidden_size": 128},
        **{"attention_head_dim": 32, "num_key_value_heads": 4, "mamba_headdim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}


class CannotBuild(Exception):
    """No tiny model of this architecture."""


def tiny(kind: str) -> PreTrainedModel:
    """A model of `kind`, a `model_type`, in float32, the same at every call. Raises CannotBuild."""
    torch.manual_seed(0)
    try:
        config = tiny_config(kind)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > MOST:
            raise CannotBuild(f"{size / 1e6:.0f} million parameters")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except CannotBuild:
        raise
    except Exception as error:  # whatever a config or a constructor says of sizes that do not fit
        last = (str(error).strip().splitlines() or [""])[-1].strip()
        raise CannotBuild(f"{type(error).__name__}: {last}") from error
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def tiny_config(kind: str) -> Any:
    """The default config of `kind` in small sizes, its text part where it has several."""
    config_class = CONFIG_MAPPING[kind]
    wanted = SIZES | OWN.get(kind, {})
    part = getattr(config_class, "sub_configs", {}).get("text_config")
    if isinstance(part, type):
        return config_class(text_config=_fitting(part, wanted))
    config = config_class(**_fitting(config_class, wanted))
    if set(getattr(config, "layer_types", None) or []) == {"sliding_attention"}:
        return config_class(**_fitting(config_class, wanted | {"layer_types": SLIDING}))
    return config


def _fitting(config_class: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted entries that a config of this class has."""
    known = config_class()
    aliases = getattr(config_class, "attribute_map", {})
    found = {}
    for name, value in wanted.items():
        if name in aliases or getattr(known, "__dict__", {}).get(name, known) is known:
            continue
        found[name] = value
    if "qk_rope_head_dim" in found:  # latent attention: each head has keys of its own
        found["head_dim"] = found["qk_rope_head_dim"]
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
