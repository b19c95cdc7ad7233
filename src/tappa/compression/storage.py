"""Keys and values of one layer, with as many tokens for each row and KV head as it still holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass
class RaggedKV:
    """Tokens of S = rows * kv_heads segments, one after the other, oldest first in each.

    There is no padding: a token that is dropped frees its bytes. `figures` holds one number for
    every token, `position` among them; they are dropped together with the token. While tokens are
    cut again and again by ranks that all heads share, they lie in the order of their ranks.
    """

    keys: Float[Tensor, "tokens dim"]
    values: Float[Tensor, "tokens value_dim"]
    lengths: list[int]  # tokens of each segment
    kv_heads: int
    figures: dict[str, Shaped[Tensor, " tokens"]]
    by_rank: bool = False

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "rows kv_heads new dim"],
        values: Float[Tensor, "rows kv_heads new value_dim"],
        positions: Int[Tensor, " new"],
    ) -> "RaggedKV":
        """Start with the same positions in every row and KV head."""
        rows, kv_heads, new, _ = keys.shape
        position = positions.to(torch.int32).repeat(rows * kv_heads)
        flat_keys, flat_values = (x.reshape(-1, x.shape[-1]) for x in (keys, values))
        lengths = [new] * (rows * kv_heads)
        return cls(flat_keys, flat_values, lengths, kv_heads, {"position": position})

    @classmethod
    def stack(cls, parts: "Sequence[RaggedKV]") -> "RaggedKV":
        """The rows of several, one after the other; of the figures only the positions."""
        position = torch.cat([part.figures["position"] for part in parts])
        keys, values = torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts])
        lengths = [length for part in parts for length in part.lengths]
        return cls(keys, values, lengths, parts[0].kv_heads, {"position": position})

    @property
    def rows(self) -> int:
        """Prompts of the batch."""
        return len(self.lengths) // self.kv_heads

    @property
    def uniform(self) -> bool:
        """Whether all segments hold the same number of tokens, so that no padding is needed."""
        return min(self.lengths) == max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    @property
    def sizes(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.keys.shape[1], self.values.shape[1]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of one KV head."""
        return sum(x.shape[1] * x.element_size() for x in (self.keys, self.values))

    def row_lengths(self, row: int) -> list[int]:
        """Tokens that each KV head of a row holds."""
        return self.lengths[row * self.kv_heads : (row + 1) * self.kv_heads]

    def append(
        self,
        keys: Float[Tensor, "rows kv_heads new dim"],
        values: Float[Tensor, "rows kv_heads new value_dim"],
        positions: Int[Tensor, " new"],
    ) -> None:
        """Add the same new positions to every segment. Their other figures are 0."""
        self.in_order()
        fresh = RaggedKV.of(keys, values, positions)
        new = len(positions)
        segments = len(self.lengths)

        def join(old: Tensor, added: Tensor) -> Tensor:
            if self.uniform:
                shape = (segments, -1, *old.shape[1:])
                return torch.cat([old.view(shape), added.view(shape)], 1).flatten(0, 1)
            pairs = zip(old.split(self.lengths), added.split(new), strict=True)
            return torch.cat([piece for pair in pairs for piece in pair])

        self.keys, self.values = join(self.keys, fresh.keys), join(self.values, fresh.values)
        for name, old in self.figures.items():
            added = fresh.figures.get(name)
            self.figures[name] = join(
                old,
                torch.zeros_like(fresh.figures["position"]).to(old)
                if added is None
                else added.to(old),
            )
        self.lengths = [length + new for length in self.lengths]

    def padded(
        self, row: int | None = None
    ) -> tuple[
        Float[Tensor, "rows kv_heads longest dim"],
        Float[Tensor, "rows kv_heads longest value_dim"],
        Int[Tensor, "rows kv_heads longest"],
    ]:
        """Keys, values and positions (-1: nothing there), of all rows or of one.

        Views where all segments are equally long, copies otherwise.
        """
        take = self._padding(row)
        keys, values = take(self.keys), take(self.values)
        return keys, values, take(self.figures["position"], -1)

    def figure(self, name: str, row: int) -> Shaped[Tensor, "kv_heads longest"]:
        """A figure of the tokens of one row, padded with 0."""
        return self._padding(row)(self.figures[name], 0)[0]

    def set_figure(self, name: str, row: int, padded: Shaped[Tensor, "kv_heads longest"]) -> None:
        """Write a figure of the tokens of one row, as `figure` returns it."""
        self.in_order()
        if name not in self.figures:
            self.figures[name] = padded.new_zeros(len(self.keys))
        first, last, lengths = self._row(row)
        if min(lengths) == max(lengths):
            self.figures[name][first:last] = padded.reshape(-1)
        else:
            self.figures[name][first:last] = padded[self._there(lengths, padded.shape[1])]

    def keep(self, row: int, mask: Bool[Tensor, "kv_heads longest"]) -> None:
        """Drop all tokens of a row but these."""
        self.in_order()
        first, last, lengths = self._row(row)
        held = self._there(lengths, mask.shape[1])
        flat = torch.ones(len(self.keys), dtype=torch.bool, device=mask.device)
        flat[first:last] = mask[held]
        counts = (mask & held).sum(1).tolist()
        self._filter(flat)
        self.lengths[row * self.kv_heads : (row + 1) * self.kv_heads] = counts

    def keep_ranked(self, row: int, limits: list[int], counts: list[int]) -> None:
        """Of a row, keep the tokens whose figure "rank" is below the limit of their KV head.

        A single limit is one for all heads together, whose ranks are then in one order. `counts`
        says how many tokens of each head that leaves, so that the CPU need not wait to know.
        """
        if len(limits) == 1 and self.rows == 1:
            self._keep_first(limits[0], counts)
            return
        first, last, lengths = self._row(row)
        rank = self.figures["rank"][first:last]
        if len(set(limits)) == 1:
            kept = rank < limits[0]
        else:
            each = zip(rank.split(lengths), limits, strict=True)
            kept = torch.cat([part < limit for part, limit in each])
        total = sum(counts)
        if self.rows > 1:
            whole = torch.ones(len(self.keys), dtype=torch.bool, device=kept.device)
            whole[first:last] = kept
            kept, total = whole, len(self.keys) - sum(lengths) + total
        self._take(where_true(kept, total))
        self.lengths[row * self.kv_heads : (row + 1) * self.kv_heads] = counts

    def _keep_first(self, limit: int, counts: list[int]) -> None:
        """`keep_ranked` of a single row with one limit: a layer is cut as often as others follow.

        With tokens in the order of their ranks, each cut is a copy of the first ones. Figures are
        copied in the end.
        """
        if not self.by_rank:
            rank = self.figures.pop("rank")
            places = torch.arange(len(rank), dtype=torch.int32, device=rank.device)
            order = torch.empty_like(places).scatter_(0, rank.long(), places)[:limit]
            self._take(order)
            self.figures["origin"] = order
            self.by_rank = True
        elif limit < len(self.keys):
            self.keys, self.values = self.keys[:limit].clone(), self.values[:limit].clone()
            self.figures = {name: x[:limit] for name, x in self.figures.items()}
        self.lengths = counts

    def in_order(self) -> None:
        """Put the tokens back, segment by segment and oldest first. Ranks are gone then."""
        if self.by_rank:
            self._take(torch.argsort(self.figures.pop("origin")))
            self.by_rank = False

    def drop_from(self, position: int) -> None:
        """Drop the tokens at this position and later ones."""
        self.in_order()
        kept = self.figures["position"] < position
        segments = torch.arange(len(self.lengths), device=kept.device)
        lengths = torch.tensor(self.lengths, device=kept.device)
        segment = segments.repeat_interleave(lengths, output_size=len(self.keys))
        self.lengths = segment[kept].bincount(minlength=len(self.lengths)).tolist()
        self._filter(kept)

    def select_rows(self, index: list[int]) -> None:
        """Take these rows of the batch, in this order; a row may come more than once."""
        self.in_order()
        parts = [range(row * self.kv_heads, (row + 1) * self.kv_heads) for row in index]
        segments = [segment for part in parts for segment in part]

        def take(x: Tensor) -> Tensor:
            pieces = x.split(self.lengths)
            return torch.cat([pieces[segment] for segment in segments])

        self.keys, self.values = take(self.keys), take(self.values)
        self.figures = {name: take(x) for name, x in self.figures.items()}
        self.lengths = [self.lengths[segment] for segment in segments]

    def copy(self) -> "RaggedKV":
        """An independent copy. The tensors are shared: they are never written in place."""
        figures = {name: x.clone() for name, x in self.figures.items()}
        lengths = list(self.lengths)
        return RaggedKV(self.keys, self.values, lengths, self.kv_heads, figures, self.by_rank)

    def _filter(self, kept: Tensor) -> None:
        self._take(kept.nonzero()[:, 0])

    def _take(self, at: Tensor) -> None:
        # index_select is several times faster than x[at] on CPU
        self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)
        self.figures = {name: x.index_select(0, at) for name, x in self.figures.items()}

    def _row(self, row: int) -> tuple[int, int, list[int]]:
        """First and last + 1 token of a row, and the lengths of its segments."""
        first = sum(self.lengths[: row * self.kv_heads])
        lengths = self.row_lengths(row)
        return first, first + sum(lengths), lengths

    def _there(self, lengths: list[int], longest: int) -> Bool[Tensor, "segments longest"]:
        """Where there is a token and no padding."""
        device = self.keys.device
        return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

    def _padding(self, row: int | None) -> Callable[..., Tensor]:
        """A function that brings figures of tokens into the shape (rows, kv_heads, longest)."""
        self.in_order()
        first, last = (0, len(self.keys)) if row is None else self._row(row)[:2]
        lengths = self.lengths if row is None else self.row_lengths(row)
        shape = (len(lengths) // self.kv_heads, self.kv_heads)
        longest = max(lengths)
        if min(lengths) == longest:
            return lambda x, fill=0: x[first:last].view(*shape, longest, *x.shape[1:])
        device = self.keys.device
        size = torch.tensor(lengths, device=device)
        start = size.cumsum(0) - size + first
        offset = torch.arange(longest, device=device)
        there = offset < size[:, None]
        index = torch.where(there, start[:, None] + offset, first).view(*shape, longest)
        there = there.view(*shape, longest)

        def take(x: Tensor, fill: int = 0) -> Tensor:
            out = x[index]
            return out if out.dim() == 4 else torch.where(there, out, fill)

        return take


def where_true(kept: Bool[Tensor, " tokens"], count: int) -> Int[Tensor, " kept"]:
    """Where a mask is true, as often as is known: on a GPU without waiting for it."""
    if not kept.is_cuda:
        return kept.nonzero()[:, 0]
    return kept.nonzero_static(size=count)[:, 0]
