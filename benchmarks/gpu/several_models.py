"""Models of random weights for `several.py`, with a tokenizer of one token for each character."""

from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TokenizersBackend

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# layers, hidden size, intermediate size, heads, KV heads, vocabulary
SHAPES = {
    "tiny": (4, 64, 96, 8, 4, 256),
    "small": (4, 4096, 14336, 32, 8, 32000),  # four layers of the 8B shape
    "8b": (32, 4096, 14336, 32, 8, 128256),
    "70b": (80, 8192, 28672, 64, 8, 128256),
}


def config(shape: str) -> LlamaConfig:
    """Of Llama-3.1."""
    layers, hidden, inner, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2**17,
        rope_parameters=ROPE,
        initializer_range=0.02 if hidden > 64 else 0.16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def tokenizer() -> TokenizersBackend:
    """Nothing is added."""
    symbols = ["<pad>", "<unk>", "\n", *map(chr, range(32, 127)), "—", "“", "”", "’"]
    backend = Tokenizer(models.WordLevel({s: n for n, s in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return TokenizersBackend(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def save(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer().save_pretrained(folder)


def spread(shape: str) -> PreTrainedModel:
    """A model laid on all GPUs as `device_map` lays it, its weights made where they lie."""
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16)
    count = torch.cuda.device_count() or 1
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    layers = model.config.num_hidden_layers
    numbers = {f"model.layers.{n}": n * count // layers for n in range(layers)}
    numbers |= {"model.embed_tokens": 0, "model.rotary_emb": 0}
    numbers |= {"model.norm": count - 1, "lm_head": count - 1}
    places = {name: f"{kind}:{n}" if kind == "cuda" else kind for name, n in numbers.items()}
    torch.manual_seed(0)
    for name, module in model.named_modules():
        place = next((p for n, p in places.items() if f"{name}.".startswith(f"{n}.")), None)
        for key, weight in list(module.named_parameters(recurse=False)):
            made = torch.empty(weight.shape, dtype=weight.dtype, device=place)
            made = made.fill_(1) if weight.dim() == 1 else made.normal_(std=0.02)
            setattr(module, key, torch.nn.Parameter(made, requires_grad=False))
    model.hf_device_map = places
    skipped = model._skip_keys_device_placement
    main = places["model.embed_tokens"]
    found: PreTrainedModel = dispatch_model(
        model.eval(), places, main_device=main, skip_keys=skipped, force_hooks=True
    )
    return found
