"""GGUF files of small models, as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

ADDED_ONE = ("gemma2", "gemma3", "nemotron")  # norms are stored as w + 1


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    general: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Write a model, and return it.

    `keys` of the architecture and `tensors` are added or, with None, left out; `general` keys have
    their whole name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**_keys(model), **(keys or {})}.items():
        _add(writer, f"{architecture}.{name}", value)
    for name, value in {**_tokenizer(), **(general or {})}.items():
        _add(writer, name, value)
    for name, content in {**_tensors(model, architecture), **(tensors or {})}.items():
        if content is not None:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if value is None:
        return
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](name, value)


def _keys(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    if (rms := getattr(config, "rms_norm_eps", None)) is not None:
        keys["attention.layer_norm_rms_epsilon"] = rms
    if "rope_theta" in config.rope_parameters:
        keys["rope.freq_base"] = config.rope_parameters["rope_theta"]
    width = getattr(config, "head_dim", None)
    if width:
        keys["attention.key_length"] = keys["attention.value_length"] = width
    return keys


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config: Any = model.config
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        content = tensor.numpy()
        if "experts." in name:
            found |= _experts(name, content)
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            content = _interleaved(content, getattr(config, heads))
        if architecture in ADDED_ONE and name.endswith("norm.weight"):
            content = content + 1
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        found[new_name] = content
    return found


def _interleaved(content: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which rotates neighbours."""
    halves = content.reshape(heads, 2, -1, *content.shape[1:])
    return halves.swapaxes(1, 2).reshape(content.shape)


def _experts(name: str, content: np.ndarray) -> dict[str, np.ndarray]:
    block = "blk." + name.split(".")[2]
    if name.endswith("down_proj"):
        return {f"{block}.ffn_down_exps.weight": content}
    gate, up = np.split(content, 2, axis=1)
    return {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}


def _tokenizer() -> dict[str, Any]:
    """A byte-level BPE for printable ASCII, the space and the newline, with two merges."""
    tokens = ["<|endoftext|>", "<pad>", *map(chr, range(33, 127)), "\u0120", "\u010a", "th", "the"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }
