"""Prompts that are read in pieces, so that no layer's full keys and values are held at once."""

import torch
from jaxtyping import Int
from torch import Tensor

from tappa.cache_argument import with_cache
from tappa.compression.cache import CompressedCache


def read_in_pieces(
    cache: CompressedCache,
    ids: Int[Tensor, "rows tokens"],
    chunk: int,
    mask: Int[Tensor, "rows tokens"] | None = None,
) -> None:
    """Read a prompt into an empty cache, so many tokens at a time."""
    model = cache.model
    device = next(model.parameters()).device
    with torch.inference_mode():
        for end in range(chunk, ids.shape[1] + chunk, chunk):
            piece = ids[:, end - chunk : end].to(device)
            seen = None if mask is None else mask[:, :end].to(device)
            model(piece, attention_mask=seen, logits_to_keep=1, **with_cache(model, cache))
