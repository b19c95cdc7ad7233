import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa.compression.selection import head_ranks, pooled_ranks

SEEDS = st.integers(0, 2**31)
FLOORS = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])  # whose shares are exact
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 13))
Case = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores with many ties, some tokens protected, and padding behind the tokens of a head."""
    kv_heads, tokens = draw(SIZES)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scores = torch.randint(-2, 5, (kv_heads, tokens), generator=generator).float()
    protected = torch.rand(kv_heads, tokens, generator=generator) < draw(st.floats(0, 0.5))
    lengths = torch.randint(0, tokens + 1, (kv_heads, 1), generator=generator)
    lengths[0] = tokens  # no head has more than the longest
    return scores, protected, torch.arange(tokens) < lengths


def naive_order(
    scores: list[float], protected: list[bool], present: list[bool], tokens: list[int]
) -> list[int]:
    """Tokens present: protected ones first, then by falling score; the earlier one if alike."""
    held = [i for i in tokens if present[i]]
    return sorted(held, key=lambda i: (not protected[i], 0 if protected[i] else -scores[i], i))


def naive_heads(scores: Tensor, protected: Tensor, present: Tensor) -> list[list[int]]:
    return [
        naive_order(s, a, p, list(range(len(s))))
        for s, a, p in zip(scores.tolist(), protected.tolist(), present.tolist(), strict=True)
    ]


def naive_pooled(case: Case, floor: float) -> list[int]:
    """All heads' tokens in the order in which they stay, as indices of the flattened scores."""
    scores, protected, present = (x.flatten().tolist() for x in case)
    kv_heads, tokens = case[0].shape
    everything = range(kv_heads * tokens)
    served: dict[int, float] = {}

    def queue(waiting: list[int], step: float) -> None:
        free = [i for i in waiting if not protected[i]]
        for turn, i in enumerate(free, 1):
            served[i] = min(served.get(i, math.inf), turn * step)

    if floor > 0:
        for head in range(kv_heads):
            own = list(range(head * tokens, (head + 1) * tokens))
            queue(naive_order(scores, protected, present, own), kv_heads / floor)
    if floor < 1:
        queue(naive_order(scores, protected, present, list(everything)), 1 / (1 - floor))
    always = naive_order(scores, protected, present, list(everything))
    always = [i for i in always if protected[i]]
    return always + sorted(served, key=lambda i: (served[i], i))


def order_of(ranks: Tensor, present: Tensor) -> list[int]:
    """The tokens present by rank; the ranks of the others must come behind."""
    order = ranks.argsort().tolist()
    held = int(present.sum())
    assert sorted(ranks.tolist()) == list(range(len(ranks)))
    assert all(present[i] for i in order[:held])
    return order[:held]


def test_head_ranks_by_hand() -> None:
    scores = torch.tensor([[3.0, 7.0, 5.0, 7.0, 2.0], [1.0, 1.0, 1.0, 9.0, 9.0]])
    protected = torch.tensor([[False, False, False, False, True], [False, True, False, True, True]])
    present = torch.tensor([[True] * 5, [True, True, True, False, False]])
    ranks = head_ranks(scores, protected, present)
    assert ranks[0].tolist() == [4, 1, 3, 2, 0]
    assert ranks[1, :3].tolist() == [1, 0, 2]


def test_pooled_ranks_by_hand() -> None:
    # the second head has the low scores; with a quarter as the floor, it is served at 8, 16, 24,
    # and the scores at 4/3, 8/3, 4, ...
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.5, 3.0], [2.0, 1.0] + 6 * [0.0]])
    none = torch.zeros(2, 8, dtype=torch.bool)
    ranks = pooled_ranks(scores, none, ~none, 0.25)
    assert ranks[0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert ranks[1, :2].tolist() == [6, 9]


@settings(deadline=None)
@given(cases())
def test_head_ranks_are_those_of_sorted(case: Case) -> None:
    ranks = head_ranks(*case)
    for rank, present, expected in zip(ranks, case[2], naive_heads(*case), strict=True):
        assert order_of(rank, present) == expected


@settings(deadline=None)
@given(cases(), FLOORS)
def test_pooled_ranks_are_those_of_two_queues(case: Case, floor: float) -> None:
    ranks = pooled_ranks(*case, floor)
    expected = naive_pooled(case, floor)
    order = order_of(ranks.flatten(), case[2].flatten())
    flat = case[1].flatten()
    always = sum(bool(flat[i]) for i in expected)
    assert set(order[:always]) == set(expected[:always])
    assert order[always:] == expected[always:]


def kept(ranks: Tensor, present: Tensor, total: int) -> Tensor:
    return (ranks < total) & present


@settings(deadline=None)
@given(cases(), st.integers(0, 45))
def test_every_head_keeps_its_count_with_the_protected(case: Case, total: int) -> None:
    scores, protected, present = case
    stay = kept(head_ranks(*case), present, total)
    always = protected & present
    for head in range(len(scores)):
        assert int(stay[head].sum()) == min(total, int(present[head].sum()))
        inside = always[head] if total >= int(always[head].sum()) else stay[head]
        assert bool((stay[head] | ~inside).all())
        if total < int(always[head].sum()):
            assert bool((always[head] | ~stay[head]).all())


@settings(deadline=None)
@given(cases(), st.one_of(FLOORS, st.floats(0.01, 0.99)), st.integers(0, 45))
def test_all_heads_keep_the_total_with_the_protected(case: Case, floor: float, total: int) -> None:
    _, protected, present = case
    stay = kept(pooled_ranks(*case, floor), present, total)
    always = protected & present
    assert int(stay.sum()) == min(total, int(present.sum()))
    if total >= int(always.sum()):
        assert bool((stay | ~always).all())
    else:
        assert bool((always | ~stay).all())


@settings(deadline=None)
@given(
    cases(),
    st.one_of(st.none(), FLOORS, st.floats(0.01, 0.99)),
    st.integers(0, 45),
    st.integers(0, 45),
)
def test_less_is_a_part_of_more(case: Case, floor: float | None, one: int, other: int) -> None:
    """Also where less is taken from what was left of more, and ranked anew."""
    less, more = sorted((one, other))
    scores, protected, present = case

    def ranks(there: Tensor) -> Tensor:
        if floor is None:
            return head_ranks(scores, protected, there)
        return pooled_ranks(scores, protected, there, floor)

    large = kept(ranks(present), present, more)
    small = kept(ranks(present), present, less)
    assert bool((large | ~small).all())
    if floor is None or floor in (0.0, 1.0):
        assert torch.equal(kept(ranks(large), large, less), small)


@settings(deadline=None)
@given(cases(), FLOORS, st.integers(0, 45))
def test_every_head_has_the_floor_and_the_best_are_there(
    case: Case, floor: float, free: int
) -> None:
    """Of the tokens beyond the protected: the floor of an equal share, and the top of the rest."""
    scores, protected, present = case
    always = protected & present
    stay = kept(pooled_ranks(*case, floor), present, int(always.sum()) + free)
    least = math.floor(free * floor / len(scores))
    loose = present & ~protected
    for head in range(len(scores)):
        assert int((stay & loose)[head].sum()) >= min(least, int(loose[head].sum()))
    best = min(math.floor(free * (1 - floor)), int(loose.sum()))
    order = [i for i in naive_pooled(case, 0.0) if loose.flatten()[i]]
    assert all(stay.flatten()[i] for i in order[:best])


@settings(deadline=None)
@given(SIZES, st.integers(0, 39), SEEDS)
def test_a_floor_of_one_is_equal_heads(sizes: tuple[int, int], total: int, seed: int) -> None:
    scores = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(sizes, dtype=torch.bool)
    counts = kept(pooled_ranks(scores, none, ~none, 1.0), ~none, total).sum(1)
    assert int(counts.max() - counts.min()) <= 1
    each = kept(head_ranks(scores, none, ~none), ~none, int(counts.min()))
    assert bool((kept(pooled_ranks(scores, none, ~none, 1.0), ~none, total) | ~each).all())


@settings(deadline=None)
@given(SIZES, SEEDS, st.data())
def test_a_floor_of_zero_is_the_top_of_all(
    sizes: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    scores = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(sizes, dtype=torch.bool)
    total = data.draw(st.integers(1, scores.numel()))
    stay = kept(pooled_ranks(scores, none, ~none, 0.0), ~none, total)
    assert torch.equal(stay, scores >= scores.flatten().topk(total).values[-1])


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_pooled_ranks_of_one_head_are_its_own(floor: float) -> None:
    scores = torch.tensor([[2.0, 3.0, 2.0, 5.0, 7.0, 3.0]])
    protected = torch.tensor([[True, False, False, False, False, True]])
    present = torch.tensor([[True, True, True, True, True, False]])
    alone = head_ranks(scores, protected, present)
    assert torch.equal(pooled_ranks(scores, protected, present, floor), alone)
