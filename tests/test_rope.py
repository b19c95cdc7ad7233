import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tappa.errors import CaptureError
from tappa.rope import RotaryChannels, match_frequencies, period, probe_layout

POSITIONS = st.integers(0, 4096)


def channels(first: list[int], second: list[int], theta: list[float], rest: list[int]):
    one, two, left = (torch.tensor(dims, dtype=torch.int64) for dims in (first, second, rest))
    return RotaryChannels(one, two, torch.tensor(theta, dtype=torch.float64), left)


# 7 dimensions: three channels in no particular order, and dimension 3 left as it is
MIXED = channels([0, 5, 2], [4, 1, 6], [1.0, 0.3, 0.007], [3])
# A quarter turn per token, then an eighth
QUARTER = channels([0, 1], [2, 3], [math.pi / 2, math.pi / 4], [])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_rotate_turns_first_towards_second():
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    root = math.sqrt(2)
    torch.testing.assert_close(
        QUARTER.rotate(x, torch.tensor([1])), torch.tensor([[0.0, -root, 1.0, root]])
    )
    torch.testing.assert_close(
        QUARTER.rotate(x, torch.tensor([2])), torch.tensor([[-1.0, -2.0, 0.0, 0.0]])
    )


@settings(deadline=None)
@given(POSITIONS)
def test_unrotate_undoes_rotate(start: int) -> None:
    x, positions = random(2, 5, 7), torch.arange(start, start + 5)
    rotated = MIXED.rotate(x, positions)
    torch.testing.assert_close(MIXED.unrotate(rotated, positions), x, atol=1e-5, rtol=0)


@settings(deadline=None)
@given(POSITIONS, POSITIONS, st.integers(0, 10_000))
def test_logits_depend_on_the_distance_only(a: int, b: int, shift: int) -> None:
    q, k = random(2, 7)

    def logit(at: int, key_at: int) -> float:
        rotated = MIXED.rotate(torch.stack([q, k]), torch.tensor([at, key_at]))
        return float(rotated[0] @ rotated[1])

    assert logit(a, b) == pytest.approx(logit(a + shift, b + shift), abs=1e-5)
    assert logit(a, a) == pytest.approx(float(q @ k), abs=1e-5)


@settings(deadline=None)
@given(POSITIONS)
def test_rotation_keeps_norms_and_the_rest(start: int) -> None:
    x, positions = random(5, 7), torch.arange(start, start + 5)
    rotated = MIXED.rotate(x, positions)
    torch.testing.assert_close(MIXED.norms(rotated), MIXED.norms(x))
    assert torch.equal(rotated[:, 3], x[:, 3])


def test_positions_may_differ_between_heads() -> None:
    x, positions = random(2, 5, 7), torch.tensor([[0, 1, 2, 3, 4], [7, 6, 5, 9, 8]])
    expected = torch.stack([MIXED.rotate(x[h], positions[h]) for h in range(2)])
    torch.testing.assert_close(MIXED.rotate(x, positions), expected)


@settings(deadline=None)
@given(POSITIONS)
def test_chord_is_how_far_a_rotation_moves(shift: int) -> None:
    x = random(1, 7)
    moved = MIXED.norms(MIXED.rotate(x, torch.tensor([shift])) - x)
    torch.testing.assert_close(moved[0], MIXED.chord(shift) * MIXED.norms(x)[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(MIXED.chord(-shift), MIXED.chord(shift))


def test_chord_by_hand() -> None:
    chord = QUARTER.chord(torch.tensor([0, 1, 2, 4]))
    expected = [0.0, math.sqrt(2), 2.0, 0.0]  # 0, 90, 180, 360 degrees
    torch.testing.assert_close(chord[:, 0], torch.tensor(expected), atol=1e-6, rtol=0)
    assert chord[3, 1] == pytest.approx(2.0)  # 180 degrees


def test_sizes_and_frequencies() -> None:
    assert (MIXED.dim, MIXED.channels) == (7, 4)
    assert (QUARTER.dim, QUARTER.channels) == (4, 2)
    assert MIXED.frequencies.tolist() == [1.0, 0.3, 0.007, 0.0]
    none = channels([], [], [], [0, 1, 2])
    assert (none.dim, none.channels, none.frequencies.tolist()) == (3, 1, [0.0])


def test_norms_by_hand() -> None:
    x = torch.tensor([3.0, 12.0, 8.0, -7.0, 4.0, 5.0, 15.0])
    torch.testing.assert_close(MIXED.norms(x), torch.tensor([5.0, 13.0, 17.0, 7.0]))


def test_by_channel_adds_and_spread_repeats() -> None:
    figures = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    added = MIXED.by_channel(figures)
    assert added.tolist() == [1.0 + 7.0, 11.0 + 2.0, 3.0 + 13.0, 5.0]
    assert MIXED.spread(added).tolist() == [8.0, 13.0, 16.0, 5.0, 8.0, 13.0, 16.0]
    x = random(2, 5, 7)
    torch.testing.assert_close(MIXED.by_channel(x.square()).sqrt(), MIXED.norms(x))


def test_period() -> None:
    assert period(math.pi / 3) == pytest.approx(6)
    assert period(0.0) == math.inf


def half_split(x, cos, sin, rotated):
    left, right = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    turned = torch.cat([-right, left], -1)
    return torch.cat([x[..., :rotated] * cos + turned * sin, x[..., rotated:]], -1)


def interleaved(x, cos, sin, rotated, sense=1):
    half = rotated // 2
    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sense * sin))
    even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return torch.cat([x[..., :rotated] * cos + turned * sin, x[..., rotated:]], -1)


def layout_of(apply, dim: int, rotated: int, **options):
    x = random(3, 8, dim)
    layout = probe_layout(lambda cos, sin: apply(x, cos, sin, rotated, **options), rotated)
    return tuple(t.tolist() for t in (layout.first, layout.second, layout.unrotated))


def test_probe_finds_half_split_pairs() -> None:
    assert layout_of(half_split, 6, 6) == ([0, 1, 2], [3, 4, 5], [])


def test_probe_finds_interleaved_pairs() -> None:
    assert layout_of(interleaved, 6, 6) == ([0, 2, 4], [1, 3, 5], [])


def test_probe_finds_the_sense_of_rotation() -> None:
    assert layout_of(interleaved, 6, 6, sense=-1) == ([1, 3, 5], [0, 2, 4], [])


@pytest.mark.parametrize("apply", [half_split, interleaved])
def test_probe_finds_what_is_not_rotated(apply) -> None:
    assert layout_of(apply, 11, 6)[2] == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("apply", [half_split, interleaved])
def test_probed_layout_rotates_as_the_layer_does(apply) -> None:
    theta = torch.tensor([1.0, 0.3, 0.007], dtype=torch.float64)
    x, positions = random(3, 8, 11), torch.arange(8)
    layout = probe_layout(lambda cos, sin: apply(x, cos, sin, 6), 6)
    angles = positions[:, None] * torch.cat([theta, theta])
    expected = apply(x, angles.cos().float(), angles.sin().float(), 6)
    rotary = layout.channels(torch.cat([theta, theta]))
    torch.testing.assert_close(rotary.rotate(x, positions), expected, atol=1e-5, rtol=0)


def test_probe_refuses_what_turns_no_pairs() -> None:
    x = random(3, 8, 6)
    with pytest.raises(CaptureError, match="does not turn pairs"):
        probe_layout(lambda cos, sin: x * cos + x.roll(1, -1) * sin, 6)


def tables(
    theta: torch.Tensor, positions: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[:, None].float() * theta
    return factor * angles.cos(), factor * angles.sin()


FAST, SLOW = torch.tensor([1.0, 0.1, 0.01]), torch.tensor([0.5, 0.03, 0.002])


@pytest.mark.parametrize("start", [0, 1009])
@pytest.mark.parametrize("factor", [1.0, 1.37])
@pytest.mark.parametrize("buffers", [[FAST, SLOW], [SLOW, FAST]])
def test_match_picks_the_buffer_behind_the_table(buffers, factor: float, start: int) -> None:
    positions = torch.arange(start, start + 101)
    columns = torch.cat([SLOW, SLOW])
    found = match_frequencies(*tables(columns, positions, factor), positions, buffers)
    assert torch.equal(found, columns.double())


@pytest.mark.parametrize("columns", [SLOW, SLOW.repeat_interleave(2)])
def test_match_knows_every_order_of_columns(columns: torch.Tensor) -> None:
    positions = torch.arange(101)
    found = match_frequencies(*tables(columns, positions), positions, [FAST, SLOW])
    assert torch.equal(found, columns.double())


@pytest.mark.parametrize("buffers", [[], [FAST], [SLOW[:2]]])
def test_match_refuses_a_table_of_no_buffer(buffers: list) -> None:
    positions = torch.arange(101)
    with pytest.raises(CaptureError, match=rf"\({len(buffers)} found\)"):
        match_frequencies(*tables(torch.cat([SLOW, SLOW]), positions), positions, buffers)
