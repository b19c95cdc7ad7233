"""The config of a GGUF file's model: every key of the architecture is applied, idle, or refused."""

import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from tappa.errors import ModelError
from tappa.gguf_files.header import Header
from tappa.gguf_files.rope import rope_parameters

# keys that a config holds under one of these names, if the class knows one
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "use_parallel_residual": ("use_parallel_residual",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "norm_epsilon"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
# values with which a key asks for nothing
_IDLE: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1, 0),
    "embedding_scale": (1, 0),
    "residual_scale": (1, 0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (1, 0),
    "nextn_predict_layers": (0,),
    "leading_dense_block_count": (0,),
}
_HARMLESS = {"tensor_data_layout", "pooling_type", "rope.scaling.finetuned"}
_HARMLESS |= {"vocab_size"}  # the embeddings tell it
_ROPE = {"rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.dimension_count"}
_ROPE |= {
    f"rope.scaling.{name}"
    for name in ("type", "factor", "original_context_length", "attn_factor", "yarn_ext_factor")
}
_ROPE |= {f"rope.scaling.yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow")}
# keys that transformers turns into the config of an architecture of its own
_READ_BY_TRANSFORMERS = {
    "lfm2": {"shortconv.l_cache", "attention.head_count_kv"},
    "minimax-m2": {"expert_gating_func"},
}
_QWEN35 = {"full_attention_interval", "nextn_predict_layers", "rope.dimension_sections"}
_QWEN35 |= {f"ssm.{n}" for n in ("conv_kernel", "state_size", "group_count", "time_step_rank")}
_READ_BY_TRANSFORMERS["qwen35"] = _READ_BY_TRANSFORMERS["qwen35moe"] = _QWEN35 | {"ssm.inner_size"}
# where llama.cpp divides by other than the root of the head's width: layers of the largest model
_LARGEST = {"gemma2": 46, "gemma3": 62}
_ALTERNATING = ("gemma2", "gemma3", "gpt-oss")  # llama.cpp knows which layers slide: so do configs
_WINDOW = ("gemma2", "gpt-oss")  # llama.cpp knows a window where the file names none


def apply_header(config: PreTrainedConfig, header: Header) -> None:
    """Change the config that transformers made into what the file says.

    Raises ModelError that names the keys which the config's class has no place for, unless their
    value asks for nothing: a model without them would be another model.
    """
    known = type(config)()
    prefix = header.architecture + "."
    names = [name.removeprefix(prefix) for name in header.values if name.startswith(prefix)]
    idle = _HARMLESS | _ROPE | _READ_BY_TRANSFORMERS.get(header.architecture, set())
    names = [name for name in names if name not in idle]
    refused = [name for name in names if not _apply(config, known, header, name)]
    if refused:
        some = ", ".join(f"{name} = {header.get(name)!r}"[:60] for name in refused[:3])
        more = f" and {len(refused) - 3} more keys" if len(refused) > 3 else ""
        kind = f"transformers' {config.model_type}"
        raise ModelError(f"it asks for what {kind} does not do, or not so: {some}{more}")
    _apply_defaults(config, known, header)
    _apply_biases(config, known, header)
    _apply_rope(config, known, header)


def head_width(header: Header) -> int:
    """Numbers of one head's key: `attention.key_length`, else the embeddings' share of a head."""
    heads = _one(header.get("attention.head_count"))
    return int(header.get("attention.key_length") or header.get("embedding_length") // heads)


def _apply(config: PreTrainedConfig, known: PreTrainedConfig, header: Header, name: str) -> bool:
    """Give the config the value of one key. False where it cannot hold it."""
    value = _one(header.get(name))
    if isinstance(value, list):  # differs by layer
        return name == "attention.sliding_window_pattern" and _set_pattern(config, known, value)
    if name in _IDLE and any(math.isclose(value, idle) for idle in _IDLE[name]):
        return True
    if special := _SPECIAL.get(name):
        return special(config, known, header)
    return _set(config, known, _ATTRIBUTES.get(name, ()), value)


def _set(
    config: PreTrainedConfig, known: PreTrainedConfig, attributes: tuple[str, ...], value: Any
) -> bool:
    for attribute in attributes:
        if hasattr(known, attribute):
            setattr(config, attribute, value)
            return True
    return False


def _key_length(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    width, heads = head_width(header), _one(header.get("attention.head_count"))
    if "head_dim" in vars(known) or width * heads != header.get("embedding_length"):
        config.head_dim = width
    return True


def _value_length(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    return bool(header.get("attention.value_length") == head_width(header))


def _scale(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    scale = header.get("attention.scale")
    if scale == 0 or math.isclose(scale, head_width(header) ** -0.5, rel_tol=1e-5):
        return True
    if hasattr(known, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = scale**-2
        return True
    return _set(config, known, ("attention_multiplier",), scale)


def _sliding_window(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    window = header.get("attention.sliding_window")
    if not 0 < window < header.get("context_length"):
        return True
    tells_layers = header.get("attention.sliding_window_pattern") is not None
    if getattr(known, "layer_types", None) and header.architecture not in _ALTERNATING:
        return tells_layers and _set(config, known, ("sliding_window",), window)
    return _set(config, known, ("sliding_window",), window)


def _pattern(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    every = header.get("attention.sliding_window_pattern")
    if isinstance(every, bool) or every < 1:
        return False
    layers = range(header.get("block_count"))
    return _set_pattern(config, known, [every > 1 and i % every < every - 1 for i in layers])


def _set_pattern(config: PreTrainedConfig, known: PreTrainedConfig, slides: list[Any]) -> bool:
    if not getattr(known, "layer_types", None) or len(slides) != config.num_hidden_layers:
        return False
    config.layer_types = ["sliding_attention" if s else "full_attention" for s in slides]
    if hasattr(known, "use_sliding_window"):
        config.use_sliding_window = any(slides)
    return True


def _expert_width(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    width = header.get("expert_feed_forward_length")
    same = bool(width == _one(header.get("feed_forward_length")))
    return _set(config, known, ("moe_intermediate_size",), width) or same


def _gating(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> bool:
    return bool(header.get("expert_gating_func") == 1)  # softmax, as in all models read here


_SPECIAL: dict[str, Callable[[PreTrainedConfig, PreTrainedConfig, Header], bool]] = {
    "attention.key_length": _key_length,
    "attention.value_length": _value_length,
    "attention.scale": _scale,
    "attention.sliding_window": _sliding_window,
    "attention.sliding_window_pattern": _pattern,
    "expert_feed_forward_length": _expert_width,
    "expert_gating_func": _gating,
}


def _apply_defaults(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> None:
    """What llama.cpp takes for granted where a key is missing, not what a config class does."""
    heads = _one(header.get("attention.head_count"))
    if header.get("attention.head_count_kv") is None:
        _set(config, known, ("num_key_value_heads", "num_kv_heads"), heads)
    _key_length(config, known, header)
    if hasattr(known, "query_pre_attn_scalar") and not header.get("attention.scale"):
        largest = header.get("block_count") == _LARGEST.get(header.architecture)
        wide = header.get("embedding_length") // heads if largest else head_width(header)
        config.query_pre_attn_scalar = wide
    config.vocab_size = header.tensors["token_embd.weight"].shape[0]
    if not header.get("attention.sliding_window") and header.architecture not in _WINDOW:
        if hasattr(known, "sliding_window"):
            config.sliding_window = None
        if getattr(known, "layer_types", None) and header.architecture != "lfm2":
            _set_pattern(config, known, [False] * config.num_hidden_layers)


def _apply_biases(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> None:
    """Switch on those biases that a config class leaves off, and the file has."""
    places = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias", "attn_qkv.bias": "bias"}
    for ending, attribute in places.items():
        if f"blk.0.{ending}" in header.tensors and hasattr(known, attribute):
            setattr(config, attribute, True)


def _apply_rope(config: PreTrainedConfig, known: PreTrainedConfig, header: Header) -> None:
    before = getattr(known, "rope_parameters", None)
    if not before:
        return
    if "full_attention" in before:
        config.rope_parameters = {
            "sliding_attention": rope_parameters(header, local=True),
            "full_attention": rope_parameters(header),
        }
        return
    found = rope_parameters(header)
    kept = {k: v for k, v in (config.rope_parameters or {}).items() if k.startswith("mrope")}
    if "partial_rotary_factor" in before:
        width = head_width(header)
        found["partial_rotary_factor"] = header.get("rope.dimension_count", width) / width
    if hasattr(known, "original_max_position_embeddings"):
        context = header.get("rope.scaling.original_context_length", header.get("context_length"))
        config.original_max_position_embeddings = context
    config.rope_parameters = {**kept, **found}


def _one(value: Any) -> Any:
    """The value of a key that is given by layer and the same for all."""
    same = isinstance(value, list) and len(set(value)) == 1
    return value[0] if same else value
