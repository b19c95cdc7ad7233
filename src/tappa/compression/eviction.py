"""Tokens dropped from a FixedKV in place, all layers at once, while a captured step stays valid.

What is dropped is what a `CompressedCache` drops before it has no room for another token. The CPU
decides how many tokens each layer may hold, the GPU which. Of a model whose heads are split over
ranks, each has buffers for its own heads and knows how much the others hold: all decide alike.
"""

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from tappa.compression.cache import CompressedCache
from tappa.compression.fixed import Counts, FixedKV
from tappa.compression.scorers import FromWeights, TokenView
from tappa.compression.selection import ranks_shared, ranks_within
from tappa.compression.storage import where_true
from tappa.fetching import send
from tappa.kernels.launching import choose
from tappa.kernels.window_attention import Segments, WindowSums, window_sums_triton

NEEDS = frozenset({"window"})  # what a scorer may look at here
BLOCK = 2**22  # numbers of a padded figure of as many layers as are cut at once


class Evictor:
    """Keeps a FixedKV to the budget of the cache whose prompts it holds."""

    def __init__(
        self,
        cache: CompressedCache,
        fixed: FixedKV,
        counts: Counts,
        capacity: Int[Tensor, "layers rows ranks"],
    ) -> None:
        self.cache, self.fixed, self.shards = cache, fixed, cache.shards
        self.counts = counts.clone()  # of the heads of all ranks, as on the devices
        self.capacity = capacity
        first, *_ = cache.compressed_layers
        assert first.attention is not None
        self.attention = first.attention
        starts = [seen.first for seen in first.observations]
        self.first = torch.tensor(starts, device=fixed.keys.device)  # position, of every row
        self.pooled = cache.method.sharing == "pooled"

    @property
    def steps_left(self) -> int:
        """Steps until a row has no room for another token."""
        each = self.fixed.layer_count * self.counts.shape[2]
        held = self.counts.sum((0, 2)).tolist()
        return min((self.cache.total(row) - n) // each for row, n in enumerate(held))

    def make_room(self) -> bool:
        """Drop tokens of rows without room for another; False if a layer has no space for more.

        A layer may want to hold more than before, since what it could not hold went to others.
        """
        limits = torch.stack([self._limits(row) for row in range(self.fixed.rows)], 1)
        if bool((sums_of_ranks(limits, self.shards.ranks) > self.capacity).any()):
            return False
        fixed = self.fixed
        size = max(1, BLOCK // (fixed.rows * fixed.kv_heads * int(self.counts.max())))
        for first in range(0, fixed.layer_count, size):
            self._drop(slice(first, first + size), limits[first : first + size])
        lengths = fixed.lengths.view(fixed.layer_count, fixed.rows, fixed.kv_heads).cpu().long()
        self.counts = self.shards.gather(lengths, 2)
        return True

    def _limits(self, row: int) -> Int[Tensor, "layers accounts"]:
        """How many tokens each layer, or each of its KV heads, may hold of a row."""
        method = self.cache.method
        held = self.counts[:, row]
        if self.pooled:
            held = held.sum(1, keepdim=True)
        heads, total = self.counts[:, row].numel(), self.cache.total(row)
        if int(held.sum()) + heads <= total:
            return held
        total = max(total - self.cache.every * heads, method.least * heads)
        return torch.tensor(self.cache.divide(row, held.tolist(), total))

    def _drop(self, layers: slice, limits: Int[Tensor, "layers rows accounts"]) -> None:
        """Keep the best tokens of some layers and close the gaps."""
        fixed, kv_heads = self.fixed, self.fixed.kv_heads
        lengths = fixed.lengths[layers].flatten().long()
        view = HeldView(self, layers, int(self.counts[layers].max()))
        total, device = int(self.shards.mine(self.counts[layers], 2).sum()), lengths.device
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=device)
        segment = numbers.repeat_interleave(lengths, output_size=total)
        before = lengths.cumsum(0) - lengths
        offset = torch.arange(total, device=device) - before[segment]
        slot = fixed.starts[layers].flatten()[segment] + offset
        ranks = self._ranks(view, segment, offset)
        account = segment // kv_heads if self.pooled else segment
        limits = limits if self.pooled else self.shards.mine(limits, 2)
        kept = ranks < send(limits.flatten(), device)[account]
        known = not self.pooled or self.shards.ranks == 1  # else which rank holds what is pooled
        at = where_true(kept, int(limits.sum()) if known else int(kept.sum()))
        segment, slot = segment[at], slot[at]
        new = torch.zeros_like(lengths).index_add_(0, segment, torch.ones_like(slot))
        fixed.lengths[layers] = new.view(-1, fixed.rows * kv_heads).to(torch.int32)
        fixed.starts.copy_(fixed.starts_for(fixed.lengths))
        begin = fixed.starts[layers].flatten() - (new.cumsum(0) - new)
        to = begin[segment] + torch.arange(len(at), device=device)
        for x in (fixed.keys, fixed.values, fixed.positions):
            x.index_copy_(0, to, x.index_select(0, slot))

    def _ranks(
        self, view: "HeldView", segment: Int[Tensor, " tokens"], offset: Int[Tensor, " tokens"]
    ) -> Int[Tensor, " tokens"]:
        scores, positions = self.cache.method.scorer.score(view), view.positions
        if self.pooled and self.shards.ranks > 1:
            return self._ranks_of_all(scores, positions)[segment, offset]
        scores, positions = scores[segment, offset], positions[segment, offset]
        layer = segment // self.fixed.kv_heads
        protected = self._protected(positions, layer)
        present = torch.ones_like(protected)
        if not self.pooled:
            return ranks_within(scores, protected, present, segment)
        heads, floor = self.fixed.kv_heads, self.cache.method.floor
        return ranks_shared(scores, protected, present, segment, layer, heads, floor)

    def _ranks_of_all(
        self, scores: Float[Tensor, "kv_heads tokens"], positions: Int[Tensor, "kv_heads tokens"]
    ) -> Int[Tensor, "kv_heads tokens"]:
        """Of the tokens of this rank's heads, among those of all ranks."""
        fixed, longest = self.fixed, scores.shape[1]
        mine = torch.stack([scores, positions.to(scores)], 1)
        every = self.shards.gather(mine.unflatten(0, (-1, fixed.rows, fixed.kv_heads)), 2)
        kv_heads = every.shape[2]
        scores, positions = (x.flatten() for x in every.flatten(0, 2).unbind(1))
        segment = torch.arange(len(scores), device=scores.device) // longest
        layer, present = segment // kv_heads, positions >= 0
        protected = self._protected(positions, layer)
        floor = self.cache.method.floor
        ranks = ranks_shared(scores, protected, present, segment, layer, kv_heads, floor)
        return self.shards.mine(ranks.view(-1, kv_heads, longest), 1).flatten(0, 1)

    def _protected(
        self, positions: Real[Tensor, " tokens"], layer: Int[Tensor, " tokens"]
    ) -> Bool[Tensor, " tokens"]:
        """Tokens that stay in any case. `layer` counts the rows of each as layers of their own."""
        method, fixed = self.cache.method, self.fixed
        late = positions >= fixed.seen - method.window
        return late | (positions < self.first[layer % fixed.rows] + method.sinks)


def sums_of_ranks(
    limits: Int[Tensor, "layers rows accounts"], ranks: int
) -> Int[Tensor, "layers rows ranks"]:
    """What the heads of each rank may hold together; with one account for all heads, all of it."""
    if limits.shape[2] == 1:
        return limits.expand(-1, -1, ranks)
    return limits.unflatten(2, (ranks, -1)).sum(3)


class HeldView(TokenView):
    """The tokens of some layers of a FixedKV as one with many KV heads.

    Keys are copied out of their buffer only where they are asked for.
    """

    slots: Int[Tensor, "kv_heads tokens"]
    fixed: FixedKV
    segments: Segments

    def __init__(self, evictor: Evictor, layers: slice, longest: int) -> None:
        fixed = evictor.fixed
        starts, lengths = fixed.starts[layers].flatten(), fixed.lengths[layers].flatten()
        offset = torch.arange(longest, device=starts.device)
        there = offset < lengths[:, None]
        slots = torch.where(there, starts[:, None] + offset, 0)
        window = torch.empty(0)
        if fixed.recent is not None:
            window = fixed.recent[layers].flatten(0, 1)
        size = window.shape[1] if window.dim() == 3 else 1
        last = torch.arange(fixed.seen - size, fixed.seen, device=starts.device)
        self.__dict__.update(
            positions=torch.where(there, fixed.positions[slots], -1),
            window=window,
            window_positions=last.roll(fixed.seen % size),
            attention=evictor.attention,
            seen=fixed.seen,
            slots=slots,
            fixed=fixed,
            segments=Segments(fixed.keys, fixed.positions, starts, lengths, longest),
        )

    @cached_property
    def keys(self) -> Float[Tensor, "kv_heads tokens dim"]:
        """A padded copy."""
        return self.fixed.keys[self.slots]

    @cached_property
    def values(self) -> Float[Tensor, "kv_heads tokens value_dim"]:
        """A padded copy."""
        return self.fixed.values[self.slots]

    @cached_property
    def window_sums(self) -> WindowSums | FromWeights:
        """Without a copy of the keys where the kernel runs."""
        return choose("window_sums", self.window, self._sums_by_kernel, lambda: FromWeights(self))

    def _sums_by_kernel(self) -> WindowSums:
        queries = self.window.view(len(self.positions), -1, *self.window.shape[1:])
        attention = self.attention
        return window_sums_triton(
            self.segments, queries, self.window_positions, attention.scale, attention.softcap
        )
