import math
from collections.abc import Iterator
from dataclasses import fields
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tappa import attention_profile as module
from tappa.attention_profile import (
    Attention,
    AttentionProfile,
    attention_profile,
    attention_profile_reference,
    attention_rows,
    persistence,
)

LAGS = 13
ATTENTIONS = [
    Attention(scale=0.7),
    Attention(scale=0.7, window=5),
    Attention(scale=0.7, window=1),
    Attention(scale=0.7, window=1009),
    Attention(scale=0.7, softcap=1.3),
    Attention(scale=0.7, window=11, softcap=1.3),
]
every_attention = pytest.mark.parametrize("attention", ATTENTIONS, ids=str)


def vectors(tokens: int, kv_heads: int = 3, group: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random queries and keys of 7 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (kv_heads * group, tokens, 7), (kv_heads, tokens, 7)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore


def assert_same(actual: AttentionProfile, expected: AttentionProfile) -> None:
    for name in (field.name for field in fields(AttentionProfile)):
        a, b = getattr(actual, name), getattr(expected, name)
        if isinstance(b, int):
            assert a == b, name
            continue
        tolerance = 1e-5 * max(1.0, float(b.abs().max()))
        a, b = a.double(), b.double()
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5, msg=partial(_named, name))


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


@every_attention
@pytest.mark.parametrize("tokens", [1, 2, 5, 41])
def test_profile_is_that_of_the_full_matrix(attention: Attention, tokens: int) -> None:
    inputs = (*vectors(tokens), attention, LAGS)
    assert_same(attention_profile(*inputs), attention_profile_reference(*inputs))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 37), st.integers(1, 3), st.integers(1, 3), st.integers(1, 41), st.data())
def test_profile_of_any_size(tokens: int, kv_heads: int, group: int, lags: int, data) -> None:
    attention = data.draw(st.sampled_from(ATTENTIONS))
    inputs = (*vectors(tokens, kv_heads, group), attention, lags)
    assert_same(attention_profile(*inputs), attention_profile_reference(*inputs))


@every_attention
@pytest.mark.parametrize("shape", [(1, 7), (2, 16), (3, 41)])
def test_blocks_do_not_matter(attention: Attention, shape: tuple[int, int], monkeypatch) -> None:
    inputs = (*vectors(41), attention, LAGS)
    monkeypatch.setattr(module, "_block_shape", lambda *_: shape)
    assert_same(attention_profile(*inputs), attention_profile_reference(*inputs))


@pytest.mark.parametrize("window", [None, 53])
def test_no_matrix_of_all_rows_is_held(window: int | None, monkeypatch) -> None:
    tokens, sizes = 499, []
    logits = Attention.logits

    def spy(self: Attention, queries: Tensor, keys: Tensor) -> Tensor:
        out = logits(self, queries, keys)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(module, "_block_shape", lambda *_: (1, 16))
    monkeypatch.setattr(Attention, "logits", spy)
    attention_profile(*vectors(tokens), Attention(0.7, window), LAGS)
    assert len(sizes) == 3 * math.ceil(tokens / 16)
    # 2 heads of 16 rows and the one before them, and the keys that these may see
    assert max(sizes) <= 2 * 17 * (tokens if window is None else window + 16)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_block_size_is_bounded(kv_heads: int, device: str) -> None:
    for keys in (1, 101, 10_007, 1_000_003):
        heads, rows = module._block_shape(2, kv_heads, keys, torch.device(device))
        assert 1 <= heads <= kv_heads
        assert rows == 16 or 2 * heads * rows * keys <= 2**26


def chunks(
    queries: Tensor, keys: Tensor, attention: Attention, size: int, drop: bool
) -> Iterator[AttentionProfile]:
    """Profiles of consecutive pieces; with `drop`, of the keys that a sliding cache still has."""
    tokens = queries.shape[1]
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        first = max(0, start - (attention.window or tokens)) if drop else 0
        yield attention_profile(
            queries[:, start:end],
            keys[:, first:end],
            attention,
            LAGS,
            query_start=start,
            key_start=first,
            previous=queries[:, start - 1] if start else None,
        )


@every_attention
@pytest.mark.parametrize("size", [7, 40])
@pytest.mark.parametrize("drop", [False, True])
def test_chunks_add_up_to_the_whole(attention: Attention, size: int, drop: bool) -> None:
    queries, keys = vectors(41)
    first, *others = chunks(queries, keys, attention, size, drop)
    for other in others:
        first.add(other)
    assert_same(first, attention_profile_reference(queries, keys, attention, LAGS))


@every_attention
def test_every_row_of_attention_sums_to_one(attention: Attention) -> None:
    profile = attention_profile(*vectors(41), attention, 41)
    ones = torch.full((6,), 41.0, dtype=torch.float64)
    torch.testing.assert_close(profile.column_mass.sum(1), ones)
    torch.testing.assert_close(profile.lag_attention.sum(1), ones)
    assert (profile.entropy <= 41 + 1e-5).all()
    assert (profile.vertical <= 40 + 1e-5).all()
    assert (profile.diagonal <= 40 + 1e-5).all()


def test_a_head_that_looks_at_the_first_token() -> None:
    queries, keys = torch.ones(1, 11, 2), torch.zeros(1, 11, 2)
    keys[:, 0] = 50.0
    profile = attention_profile(queries, keys, Attention(1.0), 11)
    assert (profile.rows, profile.sink_rows, profile.pairs) == (11, 7, 10)
    assert float(profile.vertical) == pytest.approx(10)
    assert float(profile.diagonal) == pytest.approx(0, abs=1e-6)
    assert float(profile.sink_mass) == pytest.approx(7)
    assert float(profile.entropy) == pytest.approx(0, abs=1e-4)
    assert profile.column_mass[0].tolist() == pytest.approx([11] + 10 * [0])
    assert profile.lag_attention[0].tolist() == pytest.approx(11 * [1])
    # row t gives 100 to key 0, which lies t tokens back
    assert profile.lag_logits[0].tolist() == pytest.approx(11 * [100], abs=1e-2)
    assert profile.lag_counts.tolist() == list(range(11, 0, -1))


def test_a_head_that_looks_at_the_token_before() -> None:
    keys = torch.eye(11)[None]
    queries = 50 * keys.roll(1, 1)  # query t is key t - 1
    queries[:, 0] = 0
    profile = attention_profile(queries, keys, Attention(1.0), 11)
    assert float(profile.diagonal) == pytest.approx(9)  # row 0 sees itself only
    assert float(profile.vertical) == pytest.approx(1)  # rows 0 and 1 both look at key 0
    assert profile.lag_attention[0].tolist() == pytest.approx([1, 10] + 9 * [0], abs=1e-5)
    assert profile.lag_logits[0].tolist() == pytest.approx([0, 500] + 9 * [0], abs=1e-3)
    assert profile.column_mass[0].tolist() == pytest.approx([2] + 9 * [1] + [0], abs=1e-5)
    assert float(profile.sink_mass) == pytest.approx(1)  # row 4 looks at token 3


def test_a_head_that_looks_at_everything_alike() -> None:
    queries, keys = torch.zeros(1, 11, 2), torch.ones(1, 11, 2)
    profile = attention_profile(queries, keys, Attention(1.0), 3)
    assert float(profile.entropy) == pytest.approx(10)  # 1 for each row of several keys
    shared = sum(t / (t + 1) for t in range(1, 11))  # rows of t and t + 1 keys
    assert float(profile.vertical) == pytest.approx(shared)
    assert float(profile.diagonal) == pytest.approx(shared)
    assert float(profile.sink_mass) == pytest.approx(sum(4 / (t + 1) for t in range(4, 11)))


def test_a_window_of_uniform_attention() -> None:
    queries, keys = torch.zeros(1, 11, 2), torch.ones(1, 11, 2)
    profile = attention_profile(queries, keys, Attention(1.0, window=3), 5)
    assert profile.lag_counts.tolist() == [11, 10, 9, 0, 0]
    expected = [1 + 1 / 2 + 9 / 3, 1 / 2 + 9 / 3, 9 / 3, 0, 0]
    assert profile.lag_attention[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("window", "visible"),
    [(None, [[1, 1, 0, 0], [1, 1, 1, 1]]), (1, [[0, 1, 0, 0], [0, 0, 0, 1]])],
)
def test_visible_by_hand(window: int | None, visible: list) -> None:
    attention, rows = Attention(1.0, window), torch.tensor([1, 3])
    seen = attention.visible(rows, torch.arange(4))
    assert seen.int().tolist() == visible
    assert attention.visible_keys(rows).tolist() == seen.sum(1).tolist()


def test_softcap_bounds_logits() -> None:
    queries, keys = torch.tensor([[3.0]]), torch.tensor([[0.0, 1.0, 1000.0]])
    logits = Attention(0.5, softcap=2.0).logits(queries, keys)
    expected = [0, 2 * math.tanh(1.5 / 2), 2]
    assert logits[0].tolist() == pytest.approx(expected)


@every_attention
def test_rows_at_any_position(attention: Attention) -> None:
    queries, keys = vectors(41)
    at = torch.randint(11, 41, (6, 5), generator=torch.Generator().manual_seed(0))
    chosen = queries[torch.arange(6)[:, None], at]
    every = torch.arange(41).expand(6, 41)
    whole = attention_rows(queries, every, keys, attention)
    rows = attention_rows(chosen, at, keys, attention)
    torch.testing.assert_close(rows, whole[torch.arange(6)[:, None], at])
    torch.testing.assert_close(rows.sum(-1), torch.ones(6, 5))
    if attention.window is not None and attention.window <= 11:
        later = attention_rows(chosen, at, keys[:, 1:], attention, key_start=1)
        torch.testing.assert_close(later, rows[..., 1:])


def test_rows_agree_with_the_profile() -> None:
    queries, keys = vectors(41)
    rows = attention_rows(queries, torch.arange(41).expand(6, 41), keys, ATTENTIONS[1]).double()
    profile = attention_profile(queries, keys, ATTENTIONS[1], LAGS)
    torch.testing.assert_close(profile.column_mass, rows.sum(1), atol=1e-5, rtol=1e-5)
    for head in range(6):
        now, later = rows[head, :-1].float(), rows[head, 1:].float()
        assert float(persistence(now, later, 0)) == pytest.approx(float(profile.vertical[head]))
        assert float(persistence(now, later, 1)) == pytest.approx(float(profile.diagonal[head]))


def test_persistence_by_hand() -> None:
    now, later = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3]])
    assert float(persistence(now, later, 0)) == pytest.approx(0.1 + 0.3 + 0.2)
    assert float(persistence(now, later, 1)) == pytest.approx(0.5 + 0.3)
    assert float(persistence(now, later, 2)) == pytest.approx(0.3)
    assert float(persistence(now, later, 3)) == 0
    each = torch.tensor([0, 1, 2, 3])
    together = persistence(now.expand(4, 1, 3), later.expand(4, 1, 3), each)
    assert together.tolist() == pytest.approx([0.6, 0.8, 0.3, 0])
