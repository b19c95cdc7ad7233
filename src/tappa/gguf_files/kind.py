"""Is a GGUF file a whole language model with a tokenizer? Told by keys, before any building."""

import re
from collections.abc import Callable

from tappa.errors import ModelError
from tappa.gguf_files.header import Header

_SIZES = ("block_count", "embedding_length", "attention.head_count", "context_length")
_NO_MODEL: dict[str, tuple[str, Callable[[Header], bool]]] = {
    "a LoRA adapter": ("adapter", lambda h: "adapter.type" in h.values or _has(h, ".lora_a")),
    "the image or audio part of a model (mmproj)": (
        "mmproj",
        lambda h: h.architecture == "clip" or any(name.startswith("clip.") for name in h.values),
    ),
    "an importance matrix": ("imatrix", lambda h: any(n.startswith("imatrix.") for n in h.values)),
    "a control vector": ("controlvector", lambda h: h.architecture == "controlvector"),
    "a vocabulary": ("vocab", lambda h: not h.tensors and "tokenizer.ggml.tokens" in h.values),
}


def require_whole_model(header: Header) -> None:
    """Raise ModelError for adapters, split parts, projectors, vocabularies and incomplete files."""
    told = header.values.get("general.type", "model")
    for name, (kind, holds) in _NO_MODEL.items():
        if told == kind or holds(header):
            raise ModelError(f"expected a GGUF file with a whole model, got {name}")
    if told != "model":
        raise ModelError(f"expected a GGUF file with a whole model, got one of type {told!r}")
    parts = header.values.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        part = f"part {header.values.get('split.no', 0) + 1} of {parts}"
        raise ModelError(
            f"expected a GGUF file with a whole model, got {part}: merge them with llama-gguf-split"
        )
    _require_sizes(header)
    _require_layers(header)
    _require_tokenizer(header)


def _require_sizes(header: Header) -> None:
    if not header.architecture:
        raise ModelError("it lacks the key general.architecture")
    for name in _SIZES:
        if header.get(name) is None:
            raise ModelError(f"it lacks the key {header.architecture}.{name}")
    for name in (*_SIZES, "attention.head_count_kv", "feed_forward_length"):
        value = header.get(name, 1)
        if isinstance(value, list) and header.architecture == "lfm2":
            continue
        if type(value) is not int or not 0 < value < 2**31:
            text = f"expected one size as {header.architecture}.{name}, got {value!r}"
            raise ModelError(text[:200])


def _require_layers(header: Header) -> None:
    """The tensors of every layer, and embeddings of the width that the keys name."""
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None:
        raise ModelError("it lacks the tensor token_embd.weight")
    if embeddings.shape[-1] != header.get("embedding_length"):
        width = header.get("embedding_length")
        raise ModelError(f"expected embeddings of {width} numbers, got {embeddings.shape[-1]}")
    matches = (re.match(r"blk\.(\d+)\.", name) for name in header.tensors)
    found = {int(match[1]) for match in matches if match}
    layers = header.get("block_count")
    if found != set(range(len(found))) or len(found) != layers:
        raise ModelError(f"expected tensors of {layers} layers, got those of {len(found)}")


def _require_tokenizer(header: Header) -> None:
    """Tokens, and merges (of a BPE) that the vocabulary holds: a missing one stops a library."""
    tokens = header.values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or "tokenizer.ggml.model" not in header.values:
        raise ModelError("expected a tokenizer in the file, got none")
    rows = header.tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise ModelError(f"expected an embedding for each of {len(tokens)} tokens, got {rows}")
    for name in ("bos", "eos", "unknown", "padding"):
        number = header.values.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            limits = f"{name}_token_id below {len(tokens)}"
            raise ModelError(f"expected tokenizer.ggml.{limits}, got {number!r}")
    for name in ("token_type", "scores"):
        numbers = header.values.get(f"tokenizer.ggml.{name}", tokens)
        if not isinstance(numbers, list) or len(numbers) != len(tokens):
            raise ModelError(f"expected tokenizer.ggml.{name} of each of the {len(tokens)} tokens")
    _require_merges(header.values.get("tokenizer.ggml.merges", []), set(tokens))


def _require_merges(merges: object, tokens: set[str]) -> None:
    if not isinstance(merges, list):
        raise ModelError("expected a list as tokenizer.ggml.merges")
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else []
        if len(halves) != 2:
            raise ModelError(f"expected two tokens as a merge, got {merge!r}"[:200])
        for token in (*halves, "".join(halves)):
            if token not in tokens:
                text = f"the merge {merge!r} needs the token {token!r}, which its vocabulary lacks"
                raise ModelError(text[:200])


def _has(header: Header, ending: str) -> bool:
    return any(name.endswith(ending) for name in header.tensors)
