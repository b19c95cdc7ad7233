"""The similarity kernel under Triton's interpreter, through the functions that take its sums."""

import pytest
import torch
from torch import Tensor

from kernel_checks import check_sums
from tappa import kernels
from tappa.channels import ChannelSums, best_season
from tappa.kernels import launching
from tappa.kernels.similarity import Tiles, vector_sums
from tappa.rope import RotaryChannels
from tappa.similarity import SelfSimilarity, autocorrelation, lag_counts

HALVES = "halves"
INTERLEAVED = "interleaved"


def rotary_of(layout: str, pairs: int) -> RotaryChannels:
    i = torch.arange(2 * pairs)
    first, second = (i[:pairs], i[pairs:]) if layout == HALVES else (i[::2], i[1::2])
    theta = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return RotaryChannels(first, second, theta, i[:0])


def vectors(tokens: int, dim: int, start: int = 0) -> Tensor:
    """Self-similar vectors of 3 heads, tokens first in memory; one of them is zero."""
    generator = torch.Generator().manual_seed(tokens + dim)
    x = torch.randn(tokens, 3, dim, generator=generator).transpose(0, 1) + 0.5
    x[1, tokens // 2] = 0
    return x


def meters(pre: Tensor, post: Tensor, rotary: RotaryChannels) -> tuple[SelfSimilarity, ChannelSums]:
    similarity, channels = SelfSimilarity(window=5), ChannelSums(rotary)
    similarity.add(pre, post)
    channels.add(pre, pre[:1])
    return similarity, channels


@pytest.mark.parametrize("layout", [HALVES, INTERLEAVED])
@pytest.mark.parametrize(("tokens", "pairs", "start"), [(1, 8, 0), (67, 12, 1009), (307, 16, 31)])
def test_against_the_sums_of_vectors(
    layout: str, tokens: int, pairs: int, start: int, on_kernels: list[str]
) -> None:
    rotary, post = rotary_of(layout, pairs), vectors(tokens, 2 * pairs)
    pre = rotary.unrotate_from(post, start)
    sums = kernels.vector_sums(post, post[:1], rotary, start)
    assert on_kernels == ["similarity"]
    assert sums is not None
    expected, channels = meters(pre, post, rotary)
    similarity, found = SelfSimilarity(window=5), ChannelSums(rotary)
    similarity.add_sums(sums[0], pre, post, tokens)
    found.add_sums(*sums, tokens)
    check_sums(found.statistics(), channels.statistics())
    actual = similarity.sums()
    for variant, (cosines, count) in expected.sums().items():
        assert actual[variant][1] == count
        torch.testing.assert_close(actual[variant][0], cosines.double(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.usefixtures("poison")
def test_many_programs(stages: int) -> None:
    rotary, post = rotary_of(HALVES, 4), vectors(61, 8)
    where = slice(0, 4, 1), slice(4, 8, 1), rotary.theta, rotary.turn, 7
    tiles = Tiles(rows=2, steps=3, stages=stages)
    few, many = vector_sums(post, post, *where)[0], vector_sums(post, post, *where, tiles)[1]
    check_sums(vars(many), vars(few))


def test_chunks_meet_at_their_borders(on_kernels: list[str]) -> None:
    rotary, post = rotary_of(HALVES, 4), vectors(29, 8)
    pre = rotary.unrotate_from(post, 0)
    whole, pieces = SelfSimilarity(window=7), SelfSimilarity(window=7)
    whole.add(pre, post)
    for start, end in ((0, 3), (3, 4), (4, 20), (20, 29)):
        sums = kernels.vector_sums(post[:, start:end], post[:1, start:end], rotary, start)
        assert sums is not None
        pieces.add_sums(sums[0], pre[:, start:end], post[:, start:end], end - start)
    assert on_kernels == ["similarity"] * 4
    for variant, (cosines, count) in whole.sums().items():
        assert pieces.sums()[variant][1] == count
        actual = pieces.sums()[variant][0].double()
        torch.testing.assert_close(actual, cosines.double(), atol=1e-4, rtol=1e-4)


def test_channels_that_are_not_all_dimensions_are_left_to_torch(on_kernels: list[str]) -> None:
    i = torch.arange(10)
    partial = RotaryChannels(i[:4], i[4:8], torch.rand(4, dtype=torch.float64), i[8:])
    assert kernels.vector_sums(vectors(11, 10), vectors(11, 10), partial, 0) is None
    shuffled = RotaryChannels(
        torch.tensor([0, 5, 2]), torch.tensor([1, 4, 3]), torch.rand(3).double(), i[:0]
    )
    assert kernels.vector_sums(vectors(11, 6), vectors(11, 6), shuffled, 0) is None
    assert on_kernels == []


def test_autocorrelation_and_season(on_kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(67, 8) + 2 * torch.arange(67)[:, None].mul(2 * torch.pi / 11).cos()
    x = torch.nn.functional.normalize(x, dim=-1)
    curve, season = autocorrelation(x, 23), best_season(x, x[:1], 23)
    assert set(on_kernels) == {"autocorrelation"}
    monkeypatch.setattr(launching, "runs_on", lambda x: False)
    torch.testing.assert_close(curve, autocorrelation(x, 23), atol=1e-3, rtol=0)
    assert season.tolist() == best_season(x, x[:1], 23).tolist()
    assert int(lag_counts(67, 67, 23)[0]) == 67


@pytest.mark.parametrize(("tokens", "steps"), [(131072, 256), (32768, 256), (16384, 128), (7, 32)])
def test_short_prompts_have_short_stretches(tokens: int, steps: int) -> None:
    """40 heads: 256 programs where the prompt is long enough."""
    assert Tiles.of(40, tokens) == Tiles(steps=steps)
