"""What a head looks like on one text: small maps, the keys of each query, what methods keep."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.attention_profile import Attention
from tappa.capture import LayerView, prefill
from tappa.compression import record
from tappa.errors import CompressionError, ReportError
from tappa.files import write_atomic
from tappa.tensor_parallel import HeadShards
from tappa.texts import encode_texts

TOKENS = 512  # of the text that is shown
TOP = 3  # keys that are remembered of each query
MAX_SIZE = 256  # pixels of a map, less where there are many heads
PIXELS = 1_200_000  # of all maps of a model
STRETCH = 1000.0  # of the logarithmic scale: weights below 1 / 1000 of the largest look like none
BLOCK = 128  # rows at a time
BUDGET = 0.25  # of the tokens, in what methods keep
METHODS = ("streaming_llm", "h2o", "snapkv", "pyramidkv", "cake", "tappa")


@dataclass(frozen=True)
class Views:
    """One text as every head sees it. Heads are numbered layer by layer.

    `maps` (heads, size, size): mean attention in each cell of the T x T matrix, as a byte on a
    logarithmic scale (`stretch`). `keys`, `weights` (heads, tokens, TOP): the keys with most
    attention, and the attention in 255ths. `kept` (methods, KV heads, tokens): 1 where a method
    keeps a token at a budget of `budget` tokens for each head.
    """

    tokens: list[str]
    methods: list[str]
    budget: int
    maps: Shaped[np.ndarray, "heads size size"]
    keys: Shaped[np.ndarray, "heads tokens top"]
    weights: Shaped[np.ndarray, "heads tokens top"]
    kept: Shaped[np.ndarray, "methods kv_heads tokens"]

    def save(self, path: str | Path) -> Path:
        """Write one .npz file, atomically. Raises OutputError."""
        out = io.BytesIO()
        np.savez_compressed(out, **vars(self))
        return write_atomic(path, out.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Views":
        """Read what `save` wrote; nothing is unpickled. Raises ReportError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in cls.__dataclass_fields__}
            tokens, methods = ([str(x) for x in arrays.pop(n)] for n in ("tokens", "methods"))
            found = cls(tokens, methods, int(arrays.pop("budget")), **arrays)
            fits = found.keys.shape[1] == found.kept.shape[2] == len(found.tokens)
            if not fits or len(found.maps) != len(found.keys) or found.keys.max(initial=0) > 65535:
                raise ReportError(f"incomplete views {path}")
        except ReportError:
            raise
        except Exception as error:  # missing, another format, fields that are not there
            kind = type(error).__name__
            raise ReportError(f"cannot read the views {path}: {kind}") from error
        return found


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens: int = TOKENS,
    methods: Sequence[str] = METHODS,
    progress: Callable[[int, int], None] | None = None,
) -> Views:
    """Run a model on the first tokens of a text and remember what a report shows of it."""
    ids = encode_texts(tokenizer, [text], tokens)[0]
    config = model.config.get_text_config()
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    size = min(MAX_SIZE, len(ids), max(8, int((PIXELS / max(layers * heads, 1)) ** 0.5)))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def consume(view: LayerView) -> None:
        if progress is not None:
            progress(len(parts), layers + 1)
        parts.append(picture(view.queries, view.keys, view.attention, size))

    prefill(model, torch.tensor([ids]), consume, logits_to_keep=1)
    gather = HeadShards.of(model).gather
    every = [tuple(map(gather, part)) for part in parts]
    maps, keys, weights = (torch.cat(x).numpy() for x in zip(*every, strict=True))
    budget = max(int(len(ids) * BUDGET), 40)
    kept = _kept(model, ids, methods, budget)
    texts = [str(tokenizer.decode([i])) for i in ids]
    return Views(texts, list(methods) if kept.size else [], budget, maps, keys, weights, kept)


def picture(
    queries: Float[Tensor, "heads tokens dim"],
    keys: Float[Tensor, "kv_heads tokens dim"],
    attention: Attention,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(maps, keys, weights) of one layer, as in `Views`; no T x T matrix is held."""
    heads, tokens, dim = queries.shape
    group = heads // len(keys)
    positions = torch.arange(tokens, device=queries.device)
    cell = positions * size // tokens
    into = torch.nn.functional.one_hot(cell, size).to(queries.dtype)  # (tokens, size)
    sums = torch.zeros(heads, size, size, device=queries.device)
    counts = torch.zeros(size, size, device=queries.device)
    top = min(TOP, tokens)
    found_keys, found_weights = [], []
    columns = keys[:, None].mT.expand(-1, group, -1, -1)
    for start in range(0, tokens, BLOCK):
        rows = positions[start : start + BLOCK]
        grouped = queries[:, rows].view(len(keys), group, len(rows), dim)
        visible = attention.visible(rows, positions)
        logits = attention.logits(grouped, columns).view(heads, len(rows), tokens)
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        sums.index_add_(1, cell[rows], weights @ into)
        counts.index_add_(0, cell[rows], visible.to(into.dtype) @ into)
        best = weights.topk(top, -1)
        found_keys.append(best.indices)
        found_weights.append((best.values * 255).round())
    mean = sums / counts.clamp_min(1)
    share = mean / mean.amax((1, 2), keepdim=True).clamp_min(1e-30)
    maps = (255 * torch.log1p(STRETCH * share) / np.log1p(STRETCH)).round().to(torch.uint8)
    indices = torch.cat(found_keys, 1).to(torch.int32)
    return maps.cpu(), indices.cpu(), torch.cat(found_weights, 1).to(torch.uint8).cpu()


def _kept(
    model: PreTrainedModel, ids: Sequence[int], methods: Sequence[str], budget: int
) -> Shaped[np.ndarray, "methods kv_heads tokens"]:
    """Which tokens each method keeps; nothing where the prompt is too short to cut."""
    if budget >= len(ids) or not methods:
        return np.zeros((0, 0, len(ids)), np.uint8)
    try:
        recording = record(model, torch.tensor([list(ids)]))
    except CompressionError:  # a model that can be analysed, but whose cache is of another kind
        return np.zeros((0, 0, len(ids)), np.uint8)
    found, gather = [], HeadShards.of(model).gather
    for method in methods:
        cache = recording.compress(method, [budget])[0]
        rows: list[Tensor] = []
        for layer in cache.compressed_layers:
            held = layer.storage()
            split = held.figures["position"].split(held.lengths)
            masks = torch.zeros(len(split), len(ids), dtype=torch.uint8)
            for mask, positions in zip(masks, split, strict=True):
                mask[positions.cpu().long()] = 1
            rows += gather(masks)
        found.append(torch.stack(rows))
    return torch.stack(found).numpy()
