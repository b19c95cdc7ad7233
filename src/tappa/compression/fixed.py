"""The tokens of all layers in buffers of a fixed size, written in place: what a step can be
captured on.

All that changes from step to step is on the device: where segments begin, how many tokens they
hold, the position of the next token. So the same commands, recorded once, serve every step.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from tappa.attention_profile import Attention
from tappa.compression.storage import RaggedKV
from tappa.interface import attention_of
from tappa.kernels.ragged_decode import ragged_decode

Counts = Int[Tensor, "layers rows kv_heads"]


class FixedKV(Cache):
    """Segments (one for each layer, row and KV head) in flat buffers, with room for new tokens.

    The heads of a row in a layer lie in a region of their own, one after the other with `room`
    behind each; `capacity` is the number of tokens of each region, room left out. Heads may move
    within their region, so that they can share it.
    """

    def __init__(
        self,
        lengths: Counts,
        room: int,
        like: RaggedKV,
        seen: int,
        capacity: Int[Tensor, "layers rows"] | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.layer_count, self.rows, self.kv_heads = lengths.shape
        self.room, self.seen = room, seen
        device = like.keys.device
        held = lengths.sum(2) if capacity is None else torch.maximum(capacity, lengths.sum(2))
        regions = (held + room * self.kv_heads).flatten()
        self.capacity = held
        ends = regions.cumsum(0)
        slots = int(ends[-1])
        self.regions = (ends - regions).view(*held.shape, 1).to(device)  # where each begins
        self.keys = like.keys.new_empty(slots, like.keys.shape[1])
        self.values = like.values.new_empty(slots, like.values.shape[1])
        self.positions = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.lengths = lengths.to(device, torch.int32).flatten(1)
        self.starts = torch.empty_like(self.lengths, dtype=torch.int64)
        self.starts.copy_(self.starts_for(self.lengths))
        self.now = torch.tensor([seen], dtype=torch.int32, device=device)  # of the next token
        self.longest = int(lengths.max()) + room
        self.latest: Float[Tensor, "layers queries dim"] | None = None  # of this step
        self.recent: Float[Tensor, "layers queries window dim"] | None = None  # a ring

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffers of keys and values, room included."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def starts_for(self, lengths: Int[Tensor, "layers segments"]) -> Int[Tensor, "layers segments"]:
        """Where the segments begin if they are so long."""
        sizes = (lengths.long() + self.room).view(self.layer_count, self.rows, self.kv_heads)
        return (self.regions + sizes.cumsum(2) - sizes).flatten(1)

    def fill(self, layer: int, held: RaggedKV) -> None:
        """Copy the tokens of a layer."""
        lengths = self.lengths[layer].long()
        ahead = self.starts[layer] - (lengths.cumsum(0) - lengths)  # slot - index in `held`
        total = len(held.keys)
        at = torch.arange(total, device=lengths.device)
        at += ahead.repeat_interleave(lengths, output_size=total)
        self.keys.index_copy_(0, at, held.keys)
        self.values.index_copy_(0, at, held.values)
        self.positions.index_copy_(0, at, held.figures["position"].to(torch.int32))

    def taken(self, layer: int) -> RaggedKV:
        """The tokens of a layer, as a copy that holds no others."""
        lengths = self.lengths[layer].tolist()
        pairs = zip(self.starts[layer].tolist(), lengths, strict=True)
        at = torch.cat([torch.arange(start, start + length) for start, length in pairs])
        at = at.to(self.keys.device)
        keys, values, positions = (
            x.index_select(0, at) for x in (self.keys, self.values, self.positions)
        )
        return RaggedKV(keys, values, lengths, self.kv_heads, {"position": positions})

    def remember(self, windows: Sequence[Float[Tensor, "queries window dim"]]) -> None:
        """Keep the last queries of every layer from now on; these stand before the next token."""
        stacked = torch.stack(list(windows))
        self.recent = stacked.roll(self.seen % stacked.shape[2], 2)  # position p is at p % window
        self.latest = torch.empty_like(stacked[:, :, 0])

    def last_queries(self, layer: int) -> Float[Tensor, "queries window dim"]:
        """The last queries of a layer, oldest first."""
        assert self.recent is not None
        return self.recent[layer].roll(-(self.seen % self.recent.shape[2]), 1)

    # ---- within a step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new token goes to `attend`, which writes it."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As of one token: no mask is made, and what is compiled must not see numbers change."""
        return 1, 0

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        """Likewise."""
        return 0

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "rows heads 1 dim"],
        key: Float[Tensor, "rows kv_heads 1 dim"],
        value: Float[Tensor, "rows kv_heads 1 value_dim"],
        attention: Attention,
    ) -> Float[Tensor, "rows 1 heads value_dim"]:
        """Of one new token of every row, which is written too."""
        rows, heads, _, dim = query.shape
        segments = rows * self.kv_heads
        grouped = segments, heads // self.kv_heads, dim
        done = ragged_decode(
            query.reshape(grouped),
            key.reshape(segments, -1),
            value.reshape(segments, -1),
            *(self.keys, self.values, self.starts[layer], self.lengths[layer], self.longest),
            *(attention.scale, attention.softcap),
            kept=None if self.latest is None else self.latest[layer].view(grouped),
        )
        return done.reshape(rows, 1, heads, -1)

    def advance(self) -> None:
        """After all layers have run: count the new token, remember its queries."""
        at = (self.starts + self.lengths).flatten()
        self.positions.index_copy_(0, at, self.now.expand(len(at)))
        self.lengths += 1
        if self.recent is not None and self.latest is not None:
            place = (self.now % self.recent.shape[2]).long()
            self.recent.index_copy_(2, place, self.latest[:, :, None])
        self.now += 1

    def state(self) -> list[Tensor]:
        """What a step changes, new tokens apart."""
        return [self.lengths, self.now] + ([] if self.recent is None else [self.recent])


class _Running(threading.local):
    step: FixedKV | None = None  # whose step this thread takes


_running = _Running()


@contextmanager
def running(fixed: FixedKV) -> Iterator[None]:
    """A step on it is under way, in this thread."""
    before, _running.step = _running.step, fixed
    try:
        yield
    finally:
        _running.step = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In the place of a model's attention kernel, on the FixedKV whose step is under way."""
    layer: Any = module.layer_idx
    how: Attention = attention_of(module, query, kwargs)
    return _attend(query, key, value, layer, how.scale, how.softcap), None


# an operator, so that torch.compile sees nothing that differs from prompt to prompt
@torch.library.custom_op("tappa::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, softcap: float | None
) -> Tensor:
    assert _running.step is not None
    return _running.step.attend(layer, query, key, value, Attention(scale, softcap=softcap))


@_attend.register_fake
def _shape(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, softcap: float | None
) -> Tensor:
    return query.new_empty(len(query), 1, query.shape[1], value.shape[-1])
