"""Several caches as the rows of one: their prompts go on side by side, as one batch."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tappa.compression.cache import CompressedCache
from tappa.compression.layer import CompressedLayer
from tappa.compression.storage import RaggedKV
from tappa.errors import CompressionError


def stack_caches(caches: Sequence[CompressedCache]) -> CompressedCache:
    """A cache whose rows are those of caches of one model that have seen equally many tokens.

    They may be of different methods and budgets. Nothing more is dropped from the result, and the
    caches themselves stay as they are. Raises CompressionError where they do not fit together.
    """
    if not caches:
        raise CompressionError("expected at least one cache to stack, got none")
    seen = sorted({cache.tokens_seen for cache in caches})
    if len(seen) > 1 or seen[0] == 0 or len({id(cache.model) for cache in caches}) > 1:
        raise CompressionError(
            f"expected caches of one model that have seen the same tokens, got {seen} tokens"
        )
    stacked = caches[0].copy()
    for number, mine in enumerate(stacked.layers):
        parts = [cache.layers[number] for cache in caches]
        if isinstance(mine, CompressedLayer):
            _stack_layer(mine, cast(list[CompressedLayer], parts))
        else:
            for name in ("keys", "values"):
                tensors = [cast(Tensor, getattr(part, name)) for part in parts]
                setattr(mine, name, torch.cat(tensors))
    stacked.frozen, stacked.peak_nbytes = True, stacked.nbytes
    return stacked


def _stack_layer(mine: CompressedLayer, parts: list[CompressedLayer]) -> None:
    mine.held = RaggedKV.stack([part.storage() for part in parts])
    mine.complete = all(part.complete for part in parts)
    mine.observations = [o for part in parts for o in part.copy().observations]
    mine.preferences = [p for part in parts for p in part.preferences]
