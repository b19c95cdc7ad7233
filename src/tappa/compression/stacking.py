"""Several caches as the rows of one: their prompts go on side by side, as one batch."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tappa.compression.cache import CompressedCache
from tappa.compression.history import History
from tappa.compression.layer import CompressedLayer
from tappa.compression.storage import RaggedKV
from tappa.errors import CompressionError
from tappa.kernels.launching import runs_on
from tappa.kernels.ragged_decode import ragged_decode


def stack_caches(caches: Sequence[CompressedCache]) -> CompressedCache:
    """A cache whose rows are those of caches of one model.

    They may be of different methods, budgets and prompts; the model is to be told the positions of
    new tokens where prompts differ in length (an attention mask with padding on the left does).
    Nothing more is dropped from the result, and the caches themselves stay as they are. Raises
    CompressionError where they do not fit together.
    """
    if not caches:
        raise CompressionError("expected at least one cache to stack, got none")
    seen = [cache.tokens_seen for cache in caches]
    if min(seen) == 0 or len({id(cache.model) for cache in caches}) > 1:
        raise CompressionError(
            f"expected caches of one model that have read something, got {seen} tokens"
        )
    if min(seen) < max(seen) and len(caches[0].compressed_layers) < len(caches[0].layers):
        raise CompressionError(
            f"expected prompts of one length beside sliding-window layers, got {seen} tokens"
        )
    stacked = caches[0].copy()
    for number, mine in enumerate(stacked.layers):
        parts = [cache.layers[number] for cache in caches]
        if isinstance(mine, CompressedLayer):
            stacked.layers[number] = _stacked(cast(list[CompressedLayer], parts))
        elif getattr(mine, "keys", None) is not None:  # some layers have none of their own
            for name in ("keys", "values"):
                tensors = [cast(Tensor, getattr(part, name)) for part in parts]
                setattr(mine, name, torch.cat(tensors))
    stacked.frozen, stacked.peak_nbytes = True, stacked.nbytes
    stacked.history = History()  # of which it knows nothing
    return stacked


def _stacked(parts: Sequence[CompressedLayer]) -> CompressedLayer:
    packed = runs_on(parts[0].storage().keys) and all(part.plain for part in parts)
    return PackedLayer(parts) if packed else StackedLayer(parts)


class StackedLayer(CompressedLayer):
    """A layer of several caches, padded once and for all, so that a step costs few operations.

    Whatever the model's own mask says of earlier tokens, a row sees those that it holds.
    """

    def __init__(self, parts: Sequence[CompressedLayer]) -> None:
        super().__init__(parts[0].index, parts[0].method, parts[0].shards)
        held = RaggedKV.stack([part.storage() for part in parts])
        self.complete = self.whole = all(part.complete for part in parts) and held.uniform
        self.take(held, max(part.seen for part in parts))
        self.kv_heads = held.kv_heads
        self.module, self.attention = parts[0].module, parts[0].attention
        self.is_initialized = True

    def take(self, held: RaggedKV, seen: int) -> None:
        """Go on with these tokens, of so many that were seen."""
        self.padded_keys, self.padded_values, self.positions = held.padded()
        self.tokens = sum(held.lengths)
        self.alone = held.uniform  # no padding between the tokens
        self.seen = seen

    @property
    def held(self) -> RaggedKV | None:
        """The tokens held, without the padding."""
        there = self.positions >= 0
        lengths = there.sum(2).flatten().tolist()
        figures = {"position": self.positions[there]}
        keys, values = self.padded_keys[there], self.padded_values[there]
        return RaggedKV(keys, values, lengths, there.shape[1], figures)

    @held.setter
    def held(self, held: RaggedKV | None) -> None:
        """Only the parts bring tokens."""

    @property
    def rows(self) -> int:
        """Prompts of the batch."""
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, without the padding."""
        tensors = (self.padded_keys, self.padded_values)
        return self.tokens * sum(x.shape[-1] * x.element_size() for x in tensors)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all that are held, padded."""
        rows, kv_heads, new, _ = key_states.shape
        fresh = torch.arange(self.seen, self.seen + new, device=key_states.device)
        fresh = fresh.to(self.positions).expand(rows, kv_heads, new)
        self.padded_keys = torch.cat([self.padded_keys, key_states], 2)
        self.padded_values = torch.cat([self.padded_values, value_states], 2)
        self.positions = torch.cat([self.positions, fresh], 2)
        self.seen += new
        self.tokens += new * rows * kv_heads
        return self.padded_keys, self.padded_values

    def segments(self, returned: Tensor) -> list[Float[Tensor, "tokens dim"]]:
        """Of the keys or values returned last, those of each row and KV head."""
        pairs = zip(returned.flatten(0, 1), (self.positions >= 0).flatten(0, 1), strict=True)
        return [part[there] for part, there in pairs]

    def mask_for(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """What is held, and of the new tokens those before; True or 0 is visible."""
        new, heads = query.shape[2], query.shape[1]
        if new == 1 and self.alone:
            return None
        visible = (self.positions >= 0)[:, :, None]
        if new > 1:
            before = visible[..., :-new].expand(-1, -1, new, -1)
            among = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()
            visible = torch.cat([before, among.expand(*before.shape[:3], new)], 3)
        return _like(mask, self.for_queries(visible, heads))

    def select_rows(self, index: list[int]) -> None:
        """Take these rows of the batch, in this order."""
        at = torch.tensor(index, device=self.positions.device)
        self.padded_keys = self.padded_keys.index_select(0, at)
        self.padded_values = self.padded_values.index_select(0, at)
        self.positions = self.positions.index_select(0, at)
        self.tokens = int((self.positions >= 0).sum())

    def crop(self, tokens: int | Tensor) -> None:
        """Refused: rows may have seen different numbers of tokens."""
        raise CompressionError("a stack of caches cannot be cropped")

    def copy(self, keep_ranks: bool = False) -> "StackedLayer":
        """An independent copy: tensors are never written in place."""
        twin = StackedLayer.__new__(StackedLayer)
        twin.__dict__.update(self.__dict__)
        return twin

    def drop_padding(self, valid: Bool[Tensor, "rows new"]) -> None:
        """Nothing to do: prompts came without padding, and rows that have ended write on."""

    def forget_ranks(self) -> None:
        """There are none."""


class PackedLayer(CompressedLayer):
    """A layer of several caches without padding: every segment has room to grow in place.

    A new token costs what is held, read once by a kernel that knows the lengths. Whatever the
    model's own mask says of earlier tokens, a row sees those that it holds.
    """

    ROOM = 64  # tokens that may come before segments are moved

    def __init__(self, parts: Sequence[CompressedLayer]) -> None:
        super().__init__(parts[0].index, parts[0].method, parts[0].shards)
        self.module, self.attention = parts[0].module, parts[0].attention
        self.seen = max(part.seen for part in parts)
        self.complete, self.whole, self.is_initialized = False, False, True
        self._pack(RaggedKV.stack([part.storage() for part in parts]), self.ROOM)

    def take(self, held: RaggedKV, seen: int) -> None:
        """Go on with these tokens, of so many that were seen."""
        self.seen = seen
        self._pack(held, self.ROOM)

    def _pack(self, held: RaggedKV, room: int) -> None:
        """Lay out the segments, each with room for so many more tokens behind it."""
        device = held.keys.device
        self.kv_heads, self.room, self.tokens = held.kv_heads, room, len(held.keys)
        self.lengths = torch.tensor(held.lengths, device=device)
        self.longest = max(held.lengths)
        self.starts = (self.lengths + room).cumsum(0) - self.lengths - room
        at, size = self._places(), self.tokens + room * len(held.lengths)

        def spread(x: Tensor) -> Tensor:
            out = x.new_empty(size, *x.shape[1:])
            out[at] = x
            return out

        self.packed_keys, self.packed_values = spread(held.keys), spread(held.values)
        self.position = spread(held.figures["position"])

    def _places(self) -> Tensor:
        """Where the tokens held are, in the order of `RaggedKV`."""
        first = self.lengths.cumsum(0) - self.lengths
        shift = (self.starts - first).repeat_interleave(self.lengths, output_size=self.tokens)
        return torch.arange(self.tokens, device=shift.device) + shift

    @property
    def held(self) -> RaggedKV | None:
        """The tokens held."""
        at = self._places()
        figures = {"position": self.position[at]}
        lengths = self.lengths.tolist()
        return RaggedKV(
            self.packed_keys[at], self.packed_values[at], lengths, self.kv_heads, figures
        )

    @held.setter
    def held(self, held: RaggedKV | None) -> None:
        """Only the parts bring tokens."""

    @property
    def rows(self) -> int:
        """Prompts of the batch."""
        return len(self.starts) // self.kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, without the room behind them."""
        return self.tokens * sum(
            x.shape[-1] * x.element_size() for x in (self.packed_keys, self.packed_values)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all that are held, padded, if there are several new ones.

        A single one comes back as it is: `attend` writes it, and reads the others.
        """
        new, segments = key_states.shape[2], len(self.starts)
        if new > self.room:
            self._pack(self.storage(), max(2 * new, self.ROOM))
        fresh = torch.arange(new, device=key_states.device)
        at = (self.starts[:, None] + self.lengths[:, None] + fresh).flatten()
        position = (fresh + self.seen).to(self.position).repeat(segments)
        self.position.index_copy_(0, at, position)
        self.room -= new
        self.tokens += new * segments
        self.seen += new
        if new == 1:
            self.newest = key_states.flatten(0, 2), value_states.flatten(0, 2)
            return key_states, value_states
        self.packed_keys.index_copy_(0, at, key_states.flatten(0, 2))
        self.packed_values.index_copy_(0, at, value_states.flatten(0, 2))
        self.lengths = self.lengths + new
        held = self.storage()
        self.given = held.lengths
        keys, values, self.positions = held.padded()
        return keys, values

    def attend(self, query: Tensor) -> Float[Tensor, "rows 1 heads value_dim"]:
        """Attention of one new token on all that is held, with its own key."""
        assert self.attention is not None
        rows, heads, _, dim = query.shape
        out = ragged_decode(
            query.reshape(len(self.starts), -1, dim),
            *self.newest,
            *(self.packed_keys, self.packed_values, self.starts, self.lengths),
            longest=self.longest,
            scale=self.attention.scale,
            softcap=self.attention.softcap,
        )
        self.lengths = self.lengths + 1
        self.longest += 1
        return out.view(rows, 1, heads, -1)

    def mask_for(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """What is held, and of the new tokens those before; True or 0 is visible."""
        visible = super().mask_for(None, query)
        assert visible is not None
        return _like(mask, visible)

    def select_rows(self, index: list[int]) -> None:
        """Take these rows of the batch, in this order."""
        held = self.storage()
        held.select_rows(index)
        self._pack(held, self.ROOM)

    def crop(self, tokens: int | Tensor) -> None:
        """Refused: rows may have seen different numbers of tokens."""
        raise CompressionError("a stack of caches cannot be cropped")

    def copy(self, keep_ranks: bool = False) -> "PackedLayer":
        """An independent copy."""
        twin = PackedLayer.__new__(PackedLayer)
        twin.__dict__.update(self.__dict__)
        for name in ("packed_keys", "packed_values", "position"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def drop_padding(self, valid: Bool[Tensor, "rows new"]) -> None:
        """Nothing to do: prompts came without padding, and rows that have ended write on."""

    def forget_ranks(self) -> None:
        """There are none."""


def _like(mask: Tensor | None, visible: Bool[Tensor, "rows heads new keys"]) -> Tensor:
    """A mask of the kind that the model makes: True, or 0 where its own is of numbers."""
    if mask is None or mask.dtype == torch.bool:
        return visible
    hidden = torch.finfo(mask.dtype).min
    return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, hidden)
