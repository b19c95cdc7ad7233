"""Random-weight models and a tokenizer of a few kilobytes, with sizes no two of which are alike."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    TokenizersBackend,
)

from gguf_writing import write_gguf

VOCABULARY = 101

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 59,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that attention is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "head_dim": 10}
DIVIDED = {**COMMON, "hidden_size": 60}  # where head_dim is hidden_size / heads: 10 as well


def _rope(**parameters: Any) -> dict[str, Any]:
    return {**GROUPED, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 7,
    "query_pre_attn_scalar": 13,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}
NEOX = {
    "hidden_size": 72,  # 3 heads of 24, of which a quarter is rotated: 3 channels
    "num_attention_heads": 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.25,
    },
}
GLM = {
    "head_dim": 12,  # half of it is rotated, in interleaved pairs: 3 channels
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 42,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, GROUPED),
    "llama-linear": (LlamaConfig, _rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": (
        LlamaConfig,
        {**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 64},
    ),
    "llama-llama3": (LlamaConfig, _rope(rope_type="llama3", factor=8.0, **LLAMA3)),
    "llama-yarn": (
        LlamaConfig,
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": 7}),
    "qwen2": (Qwen2Config, DIVIDED),
    "qwen3": (Qwen3Config, GROUPED),
    "gemma3": (Gemma3TextConfig, {**GROUPED, **GEMMA3}),
    "phi3": (Phi3Config, DIVIDED),
    "gpt_neox": (GPTNeoXConfig, {**COMMON, **NEOX}),
    "cohere": (CohereConfig, DIVIDED),
    "glm": (GlmConfig, {**GROUPED, **GLM}),
    "gpt2": (GPT2Config, {"initializer_range": 0.2, **GPT2}),
}
ROPE_KINDS = [kind for kind in KINDS if kind != "gpt2"]


def tiny_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A causal model of `kind` (a key of KINDS) in float32, the same at every call.

    `changes` go into its config. Biases and norms are random too, not the zeros and ones that
    hide mistakes.
    """
    config_class, settings = KINDS[kind]
    config = config_class(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> TokenizersBackend:
    """One token for each printable ASCII character and the newline; nothing is added."""
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return TokenizersBackend(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def save_tiny(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Save the tiny model and tokenizer as a checkpoint folder."""
    tiny_model(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    """Change entries of a saved config.json."""
    change_json(folder / "config.json", **changes)
    return folder


def change_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_tiny_gguf(path: Path) -> PreTrainedModel:
    """Write the tiny qwen2 model as GGUF, and return it."""
    return write_gguf(path, tiny_model("qwen2"), "qwen2")
