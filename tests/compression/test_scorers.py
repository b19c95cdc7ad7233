import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa.attention_profile import Attention
from tappa.compression.scorers import (
    SKIPPED,
    Moments,
    Scorer,
    TokenView,
    attention_on,
    expected_attention,
    mixed,
    received,
    received_by,
    recency,
    window_mean,
    window_mean_var,
)
from tappa.rope import RotaryChannels

KV_HEADS, GROUP, DIM, VALUE_DIM = 3, 2, 7, 5
SEEDS = st.integers(0, 2**31)
ATTENTIONS = st.sampled_from(
    [Attention(0.3), Attention(1.0), Attention(0.7, softcap=1.3), Attention(0.3, window=None)]
)


def channels(first: list[int], second: list[int], theta: list[float], rest: list[int]) -> Any:
    one, two, left = (torch.tensor(dims, dtype=torch.int64) for dims in (first, second, rest))
    return RotaryChannels(one, two, torch.tensor(theta, dtype=torch.float64), left)


# 7 dimensions: three channels in no particular order, and dimension 3 left as it is
MIXED = channels([0, 5, 2], [4, 1, 6], [1.0, 0.3, 0.007], [3])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(queries: Tensor) -> Moments:
    return Moments(queries.shape[1], queries.sum(1), queries.mT @ queries)


@st.composite
def views(draw: st.DrawFn, gaps: bool = True) -> TokenView:
    """Tokens of one layer: each head holds some of those seen, and always the window."""
    seed, seen = draw(SEEDS), draw(st.integers(6, 19))
    window = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(KV_HEADS, seen, generator=generator) < (0.6 if gaps else 2.0)
    held[:, seen - window :] = True
    longest = int(held.sum(1).max())
    positions = torch.full((KV_HEADS, longest), -1)
    for head in range(KV_HEADS):
        at = held[head].nonzero()[:, 0]
        positions[head, : len(at)] = at
    return TokenView(
        keys=random(KV_HEADS, longest, DIM, seed=seed),
        values=random(KV_HEADS, longest, VALUE_DIM, seed=seed + 1),
        positions=positions,
        seen=seen,
        attention=draw(ATTENTIONS),
        window=random(KV_HEADS * GROUP, window, DIM, seed=seed + 2),
        window_positions=torch.arange(seen - window, seen),
        rotary=MIXED,
        received=random(KV_HEADS, longest, seed=seed + 3),
        moments=moments_of(random(KV_HEADS * GROUP, 11, DIM, seed=seed + 4)),
    )


def naive_attention(view: TokenView, head: int, query: Tensor, position: int) -> list[float]:
    """Attention of one query of one head on the tokens held, 0 on padding and later ones."""
    kv_head, cap = head // GROUP, view.attention.softcap
    powers = []
    for key, at in zip(view.keys[kv_head], view.positions[kv_head].tolist(), strict=True):
        logit = view.attention.scale * float(query.double() @ key.double())
        logit = logit if cap is None else cap * math.tanh(logit / cap)
        powers.append(math.exp(logit) if 0 <= at <= position else 0.0)
    return [power / sum(powers) for power in powers]


def window_attention(view: TokenView, head: int) -> list[list[float]]:
    """Rows: the window's queries; columns: the tokens held."""
    queries = zip(view.window[head], view.window_positions.tolist(), strict=True)
    return [naive_attention(view, head, query, at) for query, at in queries]


def naive_pool(figures: list[float], kernel: int) -> list[float]:
    """Mean over a token and its neighbours among those held; beyond the ends there are zeros."""
    around = range(-(kernel // 2), kernel // 2 + 1)
    ends = range(len(figures))
    return [sum(figures[i + j] for j in around if i + j in ends) / kernel for i in ends]


def naive_window(view: TokenView, gamma: float, kernel: int) -> list[list[float]]:
    out = []
    for kv_head, positions in enumerate(view.positions.tolist()):
        figures = [0.0] * len(positions)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for i, column in enumerate(zip(*window_attention(view, head), strict=True)):
                mean = sum(column) / len(column)
                spread = sum((x - mean) ** 2 for x in column) / max(len(column) - 1, 1)
                if 0 <= positions[i] < int(view.window_positions[0]):
                    figures[i] += (mean + gamma * spread) / GROUP
        out.append(naive_pool(figures, kernel))
    return out


def naive_expected(view: TokenView, future: int, value_norm: bool) -> list[list[float]]:
    """`softmax(s k.R mu + s^2/2 k.R C R^T k) |v|`, the covariance from its definition."""
    assert view.moments is not None
    out = []
    turn = mean_of_rotations(view.seen, future).double()
    scale, count = view.attention.scale, view.moments.count
    for kv_head, positions in enumerate(view.positions.tolist()):
        scores = [0.0] * len(positions)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            mean = view.moments.total[head].double() / count
            spread = view.moments.outer[head].double() / count - torch.outer(mean, mean)
            powers = []
            for key, at in zip(view.keys[kv_head].double(), positions, strict=True):
                turned = turn.T @ key
                logit = scale * float(turned @ mean)
                logit += scale**2 / 2 * float(turned @ spread @ turned)
                powers.append(math.exp(logit) if at >= view.first + SKIPPED else 0.0)
            for i, power in enumerate(powers):
                scores[i] += power / sum(powers) / GROUP
        norms = view.values[kv_head].norm(dim=-1).tolist() if value_norm else [1.0] * len(positions)
        out.append([score * norm for score, norm in zip(scores, norms, strict=True)])
    return out


def mean_of_rotations(start: int, count: int) -> Tensor:
    """Column j is the mean of the turned unit vector j."""
    unit = torch.eye(DIM)[:, None].expand(DIM, count, DIM).contiguous()
    return MIXED.rotate(unit, torch.arange(start, start + count)).mean(1).T


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_recency_by_hand() -> None:
    positions = torch.tensor([[0, 2, 11, 13], [3, 5, -1, -1]])
    view = TokenView(
        keys=random(2, 4, DIM),
        values=random(2, 4, VALUE_DIM),
        positions=positions,
        seen=14,
        attention=Attention(1.0),
        window=random(4, 0, DIM),
        window_positions=torch.arange(0),
    )
    assert recency().score(view).tolist() == [[0, 2, 11, 13], [3, 5, -1, -1]]
    assert not recency().needs


@settings(deadline=None)
@given(views())
def test_received_is_what_was_added_up(view: TokenView) -> None:
    assert view.received is not None
    assert torch.equal(received().score(view), view.received)


@settings(deadline=None, max_examples=50)
@given(views())
def test_attention_on_the_tokens_held(view: TokenView) -> None:
    for head in range(KV_HEADS * GROUP):
        close(view.weights[head], window_attention(view, head))


@settings(deadline=None, max_examples=50)
@given(views(), st.sampled_from([1, 3, 5]))
def test_window_mean(view: TokenView, kernel: int) -> None:
    close(window_mean(kernel).score(view), naive_window(view, 0.0, kernel))


@settings(deadline=None, max_examples=50)
@given(views(), st.sampled_from([1, 3, 5]), st.sampled_from([0.0, 2.0, 200.0]))
def test_window_mean_var(view: TokenView, kernel: int, gamma: float) -> None:
    close(window_mean_var(gamma, kernel).score(view), naive_window(view, gamma, kernel))


@settings(deadline=None, max_examples=50)
@given(views(), st.sampled_from([1, 2, 13]), st.booleans())
def test_expected_attention(view: TokenView, future: int, value_norm: bool) -> None:
    score = expected_attention(future, value_norm).score(view)
    close(score, naive_expected(view, future, value_norm))
    assert not score[~view.present].any()


@settings(deadline=None, max_examples=50)
@given(views(), st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 2.0]))
def test_mixed_keeps_the_mass_of_each_head(view: TokenView, share: float, gamma: float) -> None:
    seen = torch.tensor(naive_window(view, gamma, 3))
    score = mixed(share, window_mean_var(gamma, 3), future=13).score(view)
    expected = torch.tensor(naive_expected(view, 13, True)) * view.earlier
    for head in range(KV_HEADS):
        mass, total = float(seen[head].sum()), float(expected[head].sum())
        later = mass * expected[head] / total if total else torch.zeros_like(expected[head])
        torch.testing.assert_close(
            score[head], (1 - share) * seen[head] + share * later, atol=1e-5, rtol=1e-4
        )


@settings(deadline=None)
@given(views(gaps=False))
def test_window_mean_is_full_attention_where_all_is_held(view: TokenView) -> None:
    """Against torch's own attention, whose values are the unit vectors here."""
    seen = view.seen
    keys = view.keys.repeat_interleave(GROUP, 0)
    causal = torch.arange(seen) <= view.window_positions[:, None]
    weights = torch.nn.functional.scaled_dot_product_attention(
        view.window, keys, torch.eye(seen).expand(len(keys), seen, seen), causal, scale=0.3
    )
    plain = replace(view, attention=Attention(0.3))
    torch.testing.assert_close(plain.weights, weights, atol=1e-6, rtol=1e-5)
    mean = weights.mean(1).view(KV_HEADS, GROUP, seen).mean(1)
    mean[:, int(view.window_positions[0]) :] = 0
    torch.testing.assert_close(window_mean(1).score(plain), mean, atol=1e-6, rtol=1e-5)


def by_hand() -> TokenView:
    """One head, four tokens and a window of two; every logit is 0 but that of token 1, log 2."""
    return TokenView(
        keys=torch.tensor([[[0.0], [math.log(2)], [0.0], [0.0]]]),
        values=torch.tensor([[[1.0], [2.0], [3.0], [5.0]]]),
        positions=torch.tensor([[0, 1, 2, 3]]),
        seen=4,
        attention=Attention(1.0),
        window=torch.ones(1, 2, 1),
        window_positions=torch.tensor([2, 3]),
    )


def test_window_scores_by_hand() -> None:
    # rows 1/4 1/2 1/4 0 and 1/5 2/5 1/5 1/5
    view = by_hand()
    close(view.weights[0], [[1 / 4, 1 / 2, 1 / 4, 0], [1 / 5, 2 / 5, 1 / 5, 1 / 5]])
    close(window_mean(1).score(view), [[0.225, 0.45, 0, 0]])
    close(window_mean(3).score(view), [[0.225, 0.225, 0.15, 0]])
    close(window_mean_var(200.0, 1).score(view), [[0.225 + 0.25, 0.45 + 1, 0, 0]])
    close(received_by(view, view.window, view.window_positions), [[0.45, 0.9, 0.45, 0.2]])


@settings(deadline=None, max_examples=50)
@given(views())
def test_received_by(view: TokenView) -> None:
    expected = []
    for kv_head in range(KV_HEADS):
        rows = [
            row
            for head in range(kv_head * GROUP, (kv_head + 1) * GROUP)
            for row in window_attention(view, head)
        ]
        expected.append([sum(column) / GROUP for column in zip(*rows, strict=True)])
    close(received_by(view, view.window, view.window_positions), expected)


def test_received_by_in_blocks_is_that_of_one_go() -> None:
    """With as many tokens as need several blocks of queries, the last of them a part."""
    tokens, queries = 2**17, 37  # blocks of 16
    view = TokenView(
        keys=random(1, tokens, 2),
        values=random(1, tokens, 2),
        positions=torch.arange(tokens)[None],
        seen=tokens,
        attention=Attention(1.0),
        window=random(2, queries, 2, seed=1),
        window_positions=torch.arange(tokens - queries, tokens),
    )
    once = attention_on(view, view.window, view.window_positions).sum(1).mean(0, keepdim=True)
    actual = received_by(view, view.window, view.window_positions)
    torch.testing.assert_close(actual, once, atol=1e-6, rtol=1e-4)


@settings(deadline=None)
@given(views())
def test_nothing_received_is_lost(view: TokenView) -> None:
    total = received_by(view, view.window, view.window_positions).sum(1)
    torch.testing.assert_close(total, torch.full((KV_HEADS,), float(view.window.shape[1])))


SCORERS = [
    *(recency(), window_mean(3), window_mean_var(200.0, 3), mixed(0.5, window_mean(3), future=13)),
    *(expected_attention(13), expected_attention(13, False)),
]


@settings(deadline=None)
@given(views(), st.sampled_from(SCORERS), st.integers(1, 3))
def test_padding_changes_no_score(view: TokenView, scorer: Scorer, more: int) -> None:
    """However much of it there is, and whatever stands in it."""

    def pad(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], fill).repeat_interleave(more, 1)], 1)

    fills = {"keys": 97.0, "values": 89.0, "positions": -1, "received": 83.0}
    padding: Any = {name: pad(getattr(view, name), fill) for name, fill in fills.items()}
    wide = replace(view, **padding)
    score, padded = scorer.score(view), scorer.score(wide)
    torch.testing.assert_close(padded[:, : score.shape[1]], score, atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(views(), st.sampled_from(SCORERS))
def test_half_precision_is_scored_in_float32(view: TokenView, scorer: Scorer) -> None:
    names = ("keys", "values", "window")
    half = replace(view, **{name: getattr(view, name).bfloat16() for name in names})
    same = replace(view, **{name: getattr(half, name).float() for name in names})
    assert scorer.score(half).dtype == torch.float32
    torch.testing.assert_close(scorer.score(half), scorer.score(same), atol=1e-6, rtol=1e-4)


def test_needs() -> None:
    assert received().needs == {"received"}
    assert (
        window_mean().needs
        == window_mean_var().needs
        == mixed(0.0, window_mean()).needs
        == {"window"}
    )
    assert expected_attention().needs == {"moments"}
    assert mixed(0.5, window_mean()).needs == {"window", "moments"}


@settings(deadline=None)
@given(st.integers(0, 4096), st.integers(1, 31))
def test_mean_rotation_is_the_mean_of_rotations(start: int, count: int) -> None:
    torch.testing.assert_close(
        MIXED.mean_rotation(start, count), mean_of_rotations(start, count), atol=1e-5, rtol=0
    )


def test_mean_rotation_by_hand() -> None:
    quarter = channels([0], [1], [math.pi / 2], [2])
    one, two = quarter.mean_rotation(1, 1), quarter.mean_rotation(0, 2)
    expected = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(one, expected)
    expected = torch.tensor([[0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(two, expected)
    around = quarter.mean_rotation(3, 4)  # a whole turn
    torch.testing.assert_close(around, torch.diag(torch.tensor([0.0, 0.0, 1.0])))


def test_expected_attention_is_that_of_gaussian_queries() -> None:
    """The mean of `exp(s q.k)` over many queries, of which the first two moments are known."""
    queries = 0.7 + random(1, 200_000, DIM) @ (0.5 * random(DIM, DIM, seed=1))
    keys, scale, ahead = random(1, 11, DIM, seed=2), 0.3, 29
    view = TokenView(
        keys=keys,
        values=random(1, 11, VALUE_DIM),
        positions=torch.arange(11)[None],
        seen=ahead,
        attention=Attention(scale),
        window=random(1, 0, DIM),
        window_positions=torch.arange(0),
        rotary=MIXED,
        moments=moments_of(queries),
    )
    turned = MIXED.rotate(queries, torch.full((200_000,), ahead))
    mass = (scale * turned[0].double() @ keys[0].double().T).exp().mean(0)
    mass[:SKIPPED] = 0
    expected = (mass / mass.sum()).float()[None]
    actual = expected_attention(1, value_norm=False).score(view)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0.02)


@pytest.mark.parametrize("scorer", [expected_attention(13), mixed(0.5, window_mean(1), future=13)])
def test_a_prompt_too_short_for_moments_still_has_scores(scorer: Scorer) -> None:
    """Of 4 tokens no query is counted; while more are written, tokens are to be ranked."""
    nothing = moments_of(random(1, 0, 1))
    view = replace(
        by_hand(),
        positions=torch.tensor([[2, 3, 4, 5]]),
        seen=6,
        window_positions=torch.tensor([4, 5]),
        rotary=channels([], [], [], [0]),
        moments=nothing,
    )
    assert scorer.score(view).isfinite().all()
