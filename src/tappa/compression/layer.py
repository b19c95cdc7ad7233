"""The cache of one layer: ragged keys and values, their ranks, and the mask that fits them."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from tappa.attention_profile import Attention
from tappa.compression.fit import Expansion
from tappa.compression.methods import Method
from tappa.compression.observation import Observation
from tappa.compression.scorers import TokenView
from tappa.compression.selection import HeadTokens, Ranks, Scores, head_ranks, pooled_ranks
from tappa.compression.storage import RaggedKV
from tappa.errors import CompressionError
from tappa.fetching import Fetched
from tappa.interface import Attend
from tappa.tensor_parallel import HeadShards


class CompressedLayer(CacheLayerMixin):
    """The cache of one layer with full attention."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    edits = 0  # how often tokens were dropped or moved, on all ranks of a split model alike

    def __init__(self, index: int, method: Method, shards: HeadShards) -> None:
        super().__init__()
        self.index, self.method, self.shards = index, method, shards
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.edits += 1
        self.held: RaggedKV | None = None
        self.seen = 0
        self.dropped_at = 0  # tokens seen when some were last dropped
        self.complete = True  # nothing dropped so far
        self.observations: list[Observation] = []
        # rows whose tokens have ranks; the heads of their tokens by rank, if heads share a budget
        self.ranked: dict[int, Fetched | None] = {}
        self.preferences: list[Fetched | list[float]] = []  # of each row and KV head
        self.attention: Attention | None = None
        self.module: nn.Module | None = None
        # of the keys returned last: whether nothing was dropped of them, tokens of each segment,
        # positions, and whether they are not padded, so that heads attend one by one
        self.whole, self.given = True, [0]
        self.positions: Tensor = torch.empty(0)
        self.split = False
        self.kv_heads = 0
        self.expansion: Expansion | None = None  # to what attention gets
        self.plain = True  # what is returned goes to the attention of this layer alone, as it is

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update brings shapes and types."""

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all that are held, padded where heads differ in length."""
        new = key_states.shape[2]
        positions = torch.arange(self.seen, self.seen + new, device=key_states.device)
        if self.held is None:
            self.held = RaggedKV.of(key_states, value_states, positions)
            self.is_initialized = True
        else:
            self.held.append(key_states, value_states, positions)
        self.seen += new
        held = self.held
        self.kv_heads, self.whole, self.given = held.kv_heads, self.complete, list(held.lengths)
        cheap = new == 1 and key_states.device.type == "cpu" and len(held.lengths) <= 16
        self.split = cheap and not held.uniform and self.expansion is None
        if self.split:  # a call for each head takes less time than padding them
            return held.keys[None, None], held.values[None, None]
        keys, values, self.positions = held.padded()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, so that the next one gets its true position."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Masks are made for all tokens seen; `mask_for` picks those that are held."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + new, 0

    def get_max_length(self) -> int:
        """No limit to the tokens seen."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def rows(self) -> int:
        """Prompts of the batch, 0 before the first."""
        return self.held.rows if self.held is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.held.nbytes if self.held is not None else 0

    @property
    def beside_nbytes(self) -> int:
        """Bytes of what is remembered beside keys and values."""
        figures = self.held.figures.values() if self.held is not None else ()
        seen = [tensor for one in self.observations for tensor in one.tensors()]
        return sum(x.numel() * x.element_size() for x in (*figures, *seen))

    def attend(self, query: Tensor) -> Tensor | None:
        """Attention of one new token (rows, 1, heads, value_dim), if the layer does it itself."""
        return None

    def mask_for(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The model's mask over all tokens, brought to the tokens held; True or 0 is visible.

        It differs from head to head, since heads hold different tokens.
        """
        new = query.shape[2]
        if self.whole or (mask is None and new == 1 and min(self.given) == max(self.given)):
            return mask
        there = self.positions >= 0
        at = self.positions.clamp_min(0).long()[:, :, None]
        if mask is None:
            now = torch.arange(self.seen - new, self.seen, device=query.device)[:, None]
            mask = (at <= now) & there[:, :, None]
        else:
            rows, kv_heads, _, longest = at.shape
            full = mask.expand(rows, kv_heads, *mask.shape[2:])
            mask = full.gather(3, at.expand(rows, kv_heads, new, longest))
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.masked_fill(~there[:, :, None], hidden)
        return self.for_queries(mask, query.shape[1])

    def for_queries(self, x: Tensor, heads: int) -> Tensor:
        """(rows, KV heads held, ...) -> (rows, query heads, ...), each with what it attends to."""
        if self.expansion is not None:
            x = x[:, list(self.expansion.heads)]
        return x.repeat_interleave(heads // x.shape[1], 1)

    def segments(self, returned: Tensor) -> list[Float[Tensor, "tokens dim"]]:
        """Of the keys or values returned last, those of each row and KV head."""
        if self.split:
            return list(returned[0, 0].split(self.given))
        parts = returned.flatten(0, 1)
        return [part[:length] for part, length in zip(parts, self.given, strict=True)]

    def view(self, row: int) -> TokenView:
        """What a scorer sees of one row: keys and values as the attention gets them."""
        held, seen = self.storage(), self.observations[row]
        keys, values, positions = held.padded(row)
        received = held.figure("received", row) if "received" in held.figures else None
        if self.expansion is not None:
            heads = list(self.expansion.heads)
            keys, values = self.expansion.expand(keys, values)
            positions = positions[:, heads]
            received = None if received is None else received[heads]
        assert self.attention is not None
        return TokenView(
            *(keys[0], values[0], positions[0], seen.end, self.attention),
            *(seen.window, seen.window_positions, seen.rotary),
            received=received,
            moments=seen.moments,
            first=seen.first,
            module=self.module,
        )

    def rank(self, row: int, tokens: TokenView) -> None:
        """Rank the tokens of a row, for the cuts of this forward pass."""
        seen, method = self.observations[row], self.method
        scores, positions, present = method.scorer.score(tokens), tokens.positions, tokens.present
        if self.expansion is not None:
            scores, positions = self.expansion.mean(scores), self.storage().padded(row)[2][0]
            present = positions >= 0
        late = positions >= seen.end - method.window
        protected = late | (positions < seen.first + method.sinks)
        self.ranked[row] = None
        if method.sharing == "pooled":
            ranks = self._pooled_ranks(row, scores, protected, present)
        else:
            ranks = head_ranks(scores, protected, present)
        self.storage().set_figure("rank", row, ranks)

    def _pooled_ranks(
        self, row: int, scores: Scores, protected: HeadTokens, present: HeadTokens
    ) -> Ranks:
        """Among the tokens of all KV heads, those on other ranks of a split model included."""
        mine = torch.stack([scores, protected.to(scores), present.to(scores)], 1)
        every, *masks = self.shards.gather_padded(mine, 0.0).unbind(1)
        ranks = pooled_ranks(every, masks[0].bool(), masks[1].bool(), self.method.floor)
        heads = torch.arange(len(ranks), dtype=torch.int16, device=ranks.device)
        heads = heads[:, None].expand_as(ranks).flatten()
        self.ranked[row] = Fetched(torch.empty_like(heads).scatter_(0, ranks.flatten(), heads))
        mine = self.shards.mine(ranks)[:, : scores.shape[1]]
        if self.shards.ranks > 1:  # in the same order, among the tokens of this rank
            mine = mine.flatten().argsort().argsort().view_as(scores)
        return mine

    def cut(self, row: int, limits: list[int]) -> None:
        """Drop tokens of a row until each KV head (or all together) is within its limit."""
        if row not in self.ranked:
            self.rank(row, self.view(row))
        heads, held = self.ranked[row], self.storage()
        lengths = held.row_lengths(row)
        if heads is None:
            counts = [min(limit, length) for limit, length in zip(limits, lengths, strict=True)]
        else:
            most = sum(lengths) if self.shards.ranks == 1 else limits[0]
            first = heads.get()[: min(limits[0], most)]
            counts = first.bincount(minlength=held.kv_heads * self.shards.ranks).tolist()
            counts = self.shards.mine(counts)
            limits = [sum(counts)]
        held.keep_ranked(row, limits, counts)
        self.edits += 1
        self.complete = False
        self.dropped_at = self.seen

    def preference(self, row: int) -> list[float]:
        """Of each KV head of a row."""
        known = self.preferences[row]
        if isinstance(known, Fetched):
            known = self.preferences[row] = known.get().tolist()
        return known

    def drop_padding(self, valid: Bool[Tensor, "rows new"]) -> None:
        """Drop the newest tokens where they are padding."""
        held, new = self.storage(), valid.shape[1]
        for row in range(len(valid)):
            if not bool(valid[row].all()):
                positions = held.padded(row)[2][0]
                late = (positions - (self.seen - new)).clamp_min(0).long()
                held.keep(row, (positions < self.seen - new) | valid[row][late])
                self.edits += 1
                self.complete = False
                self.dropped_at = self.seen

    def forget_ranks(self) -> None:
        """Ranks are good for one pass only, and so are tables of RoPE."""
        self.ranked.clear()
        for seen in self.observations:
            if seen.rotary is not None:
                seen.rotary.forget()
        if self.held is not None:
            self.held.in_order()
            self.held.figures.pop("rank", None)

    def select_rows(self, index: list[int]) -> None:
        """Take these rows of the batch, in this order."""
        self.edits += 1
        if self.held is not None:
            self.held.select_rows(index)
            if self.observations:  # with the full cache there are none
                self.observations = [_copy(self.observations[row]) for row in index]
            if self.preferences:
                self.preferences = [self.preference(row) for row in index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows of the batch, by index or by a mask."""
        where = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.select_rows(where.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.held is not None:
            self.select_rows([row for row in range(self.held.rows) for _ in range(repeats)])

    def crop(self, tokens: int | Tensor) -> None:
        """Forget the last `-tokens` tokens; a positive number is the length to keep."""
        by = int(tokens)  # some versions of transformers send a tensor
        length = by if by > 0 else self.seen + by
        if self.held is None or length >= self.seen:
            return
        # the window is never dropped: a draft that was rejected can always be taken back
        if self.dropped_at - length >= max(self.method.window, 1):
            raise CompressionError(
                f"cannot crop to {length} tokens: some were dropped when {self.dropped_at} were "
                "seen, which cannot be undone"
            )
        if "received" in self.held.figures:
            raise CompressionError(f"{self.method.name} adds up attention, which crop cannot undo")
        self.held.drop_from(length)
        self.edits += 1
        self.seen, self.dropped_at = length, min(self.dropped_at, length)
        for observation in self.observations:
            observation.forget_from(length)

    def copy(self, keep_ranks: bool = False) -> "CompressedLayer":
        """An independent copy; without `keep_ranks` its tokens are to be ranked anew."""
        twin = CompressedLayer(self.index, self.method, self.shards)
        twin.__dict__.update(self.__dict__)
        twin.held = self.held.copy() if self.held is not None else None
        twin.observations = [_copy(o) for o in self.observations]
        twin.preferences = [self.preference(row) for row in range(len(self.preferences))]
        twin.ranked = dict(self.ranked) if keep_ranks else {}
        return twin

    def take(self, held: RaggedKV, seen: int) -> None:
        """Go on with these tokens, of so many that were seen."""
        self.edits += 1
        self.complete = self.complete and min(held.lengths) == seen
        self.held, self.seen = held, seen

    def storage(self) -> RaggedKV:
        """The tokens held."""
        assert self.held is not None, "the layer has seen no token yet"
        return self.held


def _copy(observation: Observation) -> Observation:
    """Tensors are never written in place, so that a copy of the references will do."""
    twin = Observation(**observation.__dict__)
    twin.units = type(twin.units)(**observation.units.__dict__)
    return twin


def by_segment(
    kernel: Attend,
    layer: CompressedLayer,
    module: nn.Module,
    query: Tensor,
    pair: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> Float[Tensor, "rows new heads value_dim"]:
    """Attention of every row and KV head by itself, without masks: for kernels that take none.

    `pair` is the keys and values that the layer has returned. The new tokens are the last ones of
    a segment and the kernel is causal from the end.
    """
    rows, heads, new, _ = query.shape
    group = heads // layer.kv_heads
    out = query.new_empty(rows, new, heads, pair[1].shape[-1])
    for segment, (key, value) in enumerate(zip(*map(layer.segments, pair), strict=True)):
        row, at = segment // layer.kv_heads, segment % layer.kv_heads * group
        part = query[row : row + 1, at : at + group]
        done = kernel(module, part, key[None, None], value[None, None], None, **kwargs)[0]
        out[row, :, at : at + group] = done[0]
    return out
