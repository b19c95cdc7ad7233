import random as chance
from collections.abc import Callable
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa.compression.storage import RaggedKV

KEY_DIM, VALUE_DIM = 3, 2
SEEDS = st.integers(0, 2**31)
Token = dict[str, float]  # its position, its other figures, and its "key" and "value"


class Naive:
    """What RaggedKV does, as lists of tokens: one for each KV head of each row."""

    def __init__(self, rows: int, kv_heads: int) -> None:
        self.rows: list[list[list[Token]]] = [[[] for _ in range(kv_heads)] for _ in range(rows)]

    @property
    def segments(self) -> list[list[Token]]:
        return [segment for row in self.rows for segment in row]

    def filter(self, kept: Callable[[Token], bool], row: int | None = None) -> None:
        for number, heads in enumerate(self.rows):
            if row in (None, number):
                self.rows[number] = [[t for t in tokens if kept(t)] for tokens in heads]

    def figure(self, name: str, row: int, fill: float = 0) -> list[list[float]]:
        longest = max(len(tokens) for tokens in self.rows[row])
        return [
            [t.get(name, 0) for t in tokens] + [fill] * (longest - len(tokens))
            for tokens in self.rows[row]
        ]

    def set_figure(self, name: str, row: int, figures: list[list[float]]) -> None:
        for tokens, numbers in zip(self.rows[row], figures, strict=True):
            for token, number in zip(tokens, numbers, strict=False):  # padding has no token
                token[name] = number


class Both:
    """A RaggedKV and the naive model, to which the same things happen."""

    def __init__(self, rows: int, kv_heads: int, new: int, seed: int) -> None:
        self.draw = chance.Random(seed)
        self.naive, self.kv_heads = Naive(rows, kv_heads), kv_heads
        self.numbers, self.seen = count(1), 0
        self.held = RaggedKV.of(*self.fresh(new))

    def fresh(self, new: int) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens of which no two are alike; the naive model gets them at once."""
        rows = len(self.naive.rows)
        positions = range(self.seen, self.seen + new)
        self.seen += new
        number = torch.zeros(rows, self.kv_heads, new)
        for segment, tokens in enumerate(self.naive.segments):
            for i, position in enumerate(positions):
                key = float(next(self.numbers))
                number.view(-1, new)[segment, i] = key
                tokens.append({"position": position, "key": key, "value": -key})
        keys = number[..., None] + torch.arange(KEY_DIM) / 8
        values = -number[..., None] + torch.arange(VALUE_DIM) / 8
        return keys, values, torch.tensor(positions, dtype=torch.int64)

    def row(self) -> int:
        return self.draw.randrange(len(self.naive.rows))

    def append(self) -> None:
        self.held.append(*self.fresh(self.draw.choice([1, 1, 2, 5])))

    def keep(self) -> None:
        row, share = self.row(), self.draw.random()
        kept = [[self.draw.random() < share for _ in x] for x in self.naive.figure("key", row)]
        self.naive.set_figure("kept", row, [[float(k) for k in head] for head in kept])
        self.naive.filter(lambda t: t["kept"] > 0, row)
        mask = torch.tensor(kept, dtype=torch.bool).view(self.kv_heads, -1)
        self.held.keep(row, mask)

    def keep_all(self) -> None:
        row = self.row()
        longest = max(map(len, self.naive.rows[row]))
        self.held.keep(row, torch.ones(self.kv_heads, longest, dtype=torch.bool))

    def drop_from(self) -> None:
        position = self.draw.randint(self.seen // 2, self.seen)
        self.naive.filter(lambda t: t["position"] < position)
        self.held.drop_from(position)

    def select_rows(self) -> None:
        index = [self.row() for _ in range(self.draw.randint(1, 3))]
        self.naive.rows = [
            [[dict(t) for t in tokens] for tokens in self.naive.rows[i]] for i in index
        ]
        self.held.select_rows(index)

    def set_figure(self) -> None:
        row = self.row()
        figures = [[self.draw.randint(1, 99) / 4 for _ in x] for x in self.naive.figure("key", row)]
        self.naive.set_figure("received", row, figures)
        padded = torch.tensor(figures, dtype=torch.float32).view(self.kv_heads, -1)
        self.held.set_figure("received", row, padded)

    def compare(self) -> None:
        held, naive = self.held, self.naive
        assert held.rows == len(naive.rows)
        assert held.lengths == [len(tokens) for tokens in naive.segments]
        assert held.uniform == (len({len(tokens) for tokens in naive.segments}) == 1)
        assert held.nbytes == 4 * (KEY_DIM + VALUE_DIM) * sum(map(len, naive.segments))
        whole = held.padded()
        longest = max(map(len, naive.segments))
        assert whole[2].shape == (len(naive.rows), self.kv_heads, longest)
        for row, heads in enumerate(naive.rows):
            assert held.row_lengths(row) == [len(tokens) for tokens in heads]
            assert held.padded(row)[2][0].tolist() == naive.figure("position", row, -1)
            if "received" in held.figures:
                assert held.figure("received", row).tolist() == naive.figure("received", row)
            for head, tokens in enumerate(heads):
                for keys, values, positions in (whole, held.padded(row)):
                    at = (row if len(keys) == len(naive.rows) else 0), head
                    assert positions[at].tolist()[: len(tokens)] == [t["position"] for t in tokens]
                    assert set(positions[at].tolist()[len(tokens) :]) <= {-1}
                    for x, name, dim in ((keys, "key", KEY_DIM), (values, "value", VALUE_DIM)):
                        expected = [[t[name] + i / 8 for i in range(dim)] for t in tokens]
                        assert x[at][: len(tokens)].tolist() == expected


STEPS = ("append", "keep", "keep_all", "drop_from", "select_rows", "set_figure")


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.lists(st.sampled_from(STEPS), max_size=9),
    SEEDS,
)
def test_any_steps_are_those_of_lists(
    rows: int, kv_heads: int, new: int, steps: list[str], seed: int
) -> None:
    both = Both(rows, kv_heads, new, seed)
    both.compare()
    for step in steps:
        getattr(both, step)()
        both.compare()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def filled(rows: int = 2, kv_heads: int = 3, new: int = 7) -> RaggedKV:
    keys, values = random(rows, kv_heads, new, KEY_DIM), random(rows, kv_heads, new, VALUE_DIM)
    return RaggedKV.of(keys, values, torch.arange(new))


def ragged() -> RaggedKV:
    """Two rows of three heads; the first row holds 2, 0 and 5 tokens of 7."""
    held = filled()
    at = torch.arange(7)
    held.keep(0, torch.stack([at >= 5, at < 0, at % 3 != 1]))
    return held


def test_ragged_by_hand() -> None:
    held = ragged()
    assert held.lengths == [2, 0, 5, 7, 7, 7]
    assert held.padded(0)[2].tolist() == [
        [[5, 6, -1, -1, -1], [-1] * 5, [0, 2, 3, 5, 6]],
    ]
    held.drop_from(5)
    assert held.lengths == [0, 0, 3, 5, 5, 5]
    held.append(random(2, 3, 1, KEY_DIM), random(2, 3, 1, VALUE_DIM), torch.tensor([11]))
    assert held.padded(0)[2].tolist() == [[[11, -1, -1, -1], [11, -1, -1, -1], [0, 2, 3, 11]]]


def test_figures_go_with_their_tokens() -> None:
    held = ragged()
    held.set_figure("received", 0, torch.tensor([[2.0, 3, 0, 0, 0], [0] * 5, [5, 7, 11, 13, 17]]))
    at = torch.tensor([[False, True, True, True, True], [True] * 5, [True, False] * 2 + [True]])
    held.keep(0, at)
    assert held.figure("received", 0).tolist() == [[3, 0, 0], [0] * 3, [5, 11, 17]]
    assert held.figure("received", 1).tolist() == [[0] * 7] * 3
    held.append(random(2, 3, 1, KEY_DIM), random(2, 3, 1, VALUE_DIM), torch.tensor([7]))
    assert held.figure("received", 0).tolist() == [[3, 0, 0, 0], [0] * 4, [5, 11, 17, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=3), st.booleans(), SEEDS)
def test_keep_ranked_is_keep_of_the_lowest_ranks(
    limits: list[int], pooled: bool, seed: int
) -> None:
    """One limit for each head, or one for all of them, whose ranks are then in one order."""
    kv_heads, generator = len(limits), torch.Generator().manual_seed(seed)
    if pooled:
        limits = limits[:1]
    held = filled(2, kv_heads, 5)
    held.keep(1, torch.rand(kv_heads, 5, generator=generator) < 0.7)
    lengths = held.row_lengths(1)
    longest = max(lengths)
    rank = torch.full((kv_heads, longest), 99)
    there = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if pooled:
        rank[there] = torch.randperm(sum(lengths), generator=generator)
    else:
        for head, length in enumerate(lengths):
            rank[head, :length] = torch.randperm(length, generator=generator)
    twin = held.copy()
    held.set_figure("rank", 1, rank)
    twin.keep(1, rank < torch.tensor(limits)[:, None])
    held.keep_ranked(1, limits, twin.row_lengths(1))
    assert held.lengths == twin.lengths
    for mine, theirs in zip(held.padded(), twin.padded(), strict=True):
        present = twin.padded()[2] >= 0
        assert torch.equal(mine[present], theirs[present])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.lists(st.integers(1, 15), min_size=1, max_size=4), SEEDS)
def test_one_row_is_cut_again_and_again(kv_heads: int, limits: list[int], seed: int) -> None:
    """By ranks of all heads together; in between, and in the end, all is in order again."""
    generator = torch.Generator().manual_seed(seed)
    held = filled(1, kv_heads, 5)
    rank = torch.randperm(5 * kv_heads, generator=generator).view(kv_heads, 5)
    held.set_figure("received", 0, rank / 8)
    held.set_figure("rank", 0, rank)
    whole = held.copy()
    for limit in sorted(limits, reverse=True):
        mask = rank < limit
        held.keep_ranked(0, [limit], mask.sum(1).tolist())
        twin, naive = held.copy(), whole.copy()
        naive.keep(0, mask)
        assert held.lengths == naive.lengths
        assert held.nbytes == naive.nbytes
        assert torch.equal(twin.figure("received", 0), naive.figure("received", 0))
        for mine, theirs in zip(twin.padded(), naive.padded(), strict=True):
            present = naive.padded()[2] >= 0
            assert torch.equal(mine[present], theirs[present])
    held.in_order()
    assert set(held.figures) == {"position", "received"}


def test_ranks_are_good_for_a_second_cut() -> None:
    held = filled(1, 2, 5)
    held.set_figure("rank", 0, torch.tensor([[4, 0, 3, 1, 2], [0, 1, 2, 3, 4]]))
    held.keep_ranked(0, [4, 3], [4, 3])
    held.keep_ranked(0, [2, 3], [2, 3])
    assert held.padded(0)[2].tolist() == [[[1, 3, -1], [0, 1, 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nbytes_are_those_of_the_tokens_held(dtype: torch.dtype) -> None:
    keys, values = random(2, 3, 7, 5, dtype=dtype), random(2, 3, 7, 11, dtype=dtype)
    held = RaggedKV.of(keys, values, torch.arange(7))
    assert held.nbytes == 2 * 3 * 7 * (5 + 11) * dtype.itemsize
    held.keep(1, (torch.arange(7) < torch.tensor([[0], [2], [3]])))
    assert held.nbytes == (3 * 7 + 2 + 3) * (5 + 11) * dtype.itemsize
    assert held.keys.untyped_storage().nbytes() == (3 * 7 + 2 + 3) * 5 * dtype.itemsize
    assert held.padded()[0].dtype == dtype


def test_equally_long_segments_are_views() -> None:
    held = filled()
    for row in (None, 0, 1):
        keys, values, positions = held.padded(row)
        for view, own in (
            (keys, held.keys),
            (values, held.values),
            (positions, held.figures["position"]),
        ):
            assert view.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    assert torch.equal(held.padded(1)[0][0], held.padded()[0][1])
    held = ragged()  # where the second row is still equally long
    assert held.padded(1)[0].untyped_storage().data_ptr() == held.keys.untyped_storage().data_ptr()
    assert held.padded(0)[0].untyped_storage().data_ptr() != held.keys.untyped_storage().data_ptr()


CHANGES: dict[str, Callable[[RaggedKV], None]] = {
    "append": lambda held: held.append(
        random(2, 3, 2, KEY_DIM), random(2, 3, 2, VALUE_DIM), torch.tensor([7, 8])
    ),
    "keep": lambda held: held.keep(1, (torch.arange(7) % 2 == 0).expand(3, 7)),
    "drop_from": lambda held: held.drop_from(3),
    "select_rows": lambda held: held.select_rows([1, 1, 0]),
    "set_figure": lambda held: held.set_figure("received", 1, torch.ones(3, 7)),
    "new figure": lambda held: held.set_figure("rank", 1, torch.ones(3, 7, dtype=torch.int64)),
}


def content(held: RaggedKV) -> list[object]:
    figures = {name: x.tolist() for name, x in held.figures.items()}
    return [held.keys.tolist(), held.values.tolist(), list(held.lengths), figures]


@pytest.mark.parametrize("start", [filled, ragged])
@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_independent(start: Callable[[], RaggedKV], name: str) -> None:
    held, change = start(), CHANGES[name]
    held.set_figure("received", 1, random(3, 7))
    before = content(held)
    twin = held.copy()
    assert content(twin) == before
    change(twin)
    assert content(held) == before != content(twin)
    twin = held.copy()
    change(held)
    assert content(twin) == before != content(held)
