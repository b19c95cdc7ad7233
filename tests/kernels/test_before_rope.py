"""Kernels on vectors before RoPE against those vectors, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernel_checks import check_sums
from tappa import kernels
from tappa.attention_profile import Attention
from tappa.capture import LayerView
from tappa.query_model import QueryModel, mean_change
from tappa.rope import RotaryChannels

PAIRS, HEADS = 11, 3


def rotary_of(interleaved: bool) -> RotaryChannels:
    i = torch.arange(2 * PAIRS)
    first, second = (i[::2], i[1::2]) if interleaved else (i[:PAIRS], i[PAIRS:])
    theta = 10_000.0 ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS)
    return RotaryChannels(first, second, theta, i[:0])


def view_of(rotary: RotaryChannels, tokens: int, start: int, mean: float = 0.5) -> LayerView:
    """Vectors in the order of a model's memory, tokens first; one query is zero."""
    generator = torch.Generator().manual_seed(tokens)
    draw = torch.randn(2, tokens, HEADS, 2 * PAIRS, generator=generator).transpose(1, 2) + mean
    draw[0, 1, tokens // 3] = 0
    at = torch.arange(tokens) + start
    rotated = [rotary.rotate(x, at).transpose(0, 1).contiguous().transpose(0, 1) for x in draw]
    return LayerView(0, 0, rotated[0], rotated[1], rotary, Attention(0.3), start, start)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (67, 1009), (2111, 31)])
def test_unit_vectors(interleaved: bool, tokens: int, start: int, on_kernels: list[str]) -> None:
    rotary = rotary_of(interleaved)
    view = view_of(rotary, tokens, start)
    found = kernels.unit_vectors(view.model_queries, rotary, start)
    assert on_kernels == ["unit vectors"]
    assert found is not None
    assert found.dtype == torch.float16
    expected = normalize(view.queries_before, dim=-1)
    torch.testing.assert_close(found.float(), expected, atol=1 / 2048, rtol=0)


@pytest.mark.parametrize(
    ("interleaved", "tokens", "start", "mean"),
    [(False, 2, 0, 0.5), (False, 2111, 31, 100.0), (True, 67, 1009, 0.5), (True, 67, 0, 100.0)],
)
def test_query_sums(
    interleaved: bool, tokens: int, start: int, mean: float, on_kernels: list[str]
) -> None:
    """A large mean, as of queries with a bias, does not drown the variance."""
    rotary = rotary_of(interleaved)
    view = view_of(rotary, tokens, start, mean)
    steps = [torch.ones(HEADS, dtype=torch.int64), torch.tensor([0, 1, tokens // 2])]
    model, changes = QueryModel.of_view(view, steps)
    assert on_kernels == ["query sums"]
    expected = QueryModel.of(rotary, view.queries_before)
    figures: dict[str, Tensor] = {"mean": model.mean, "variance": model.variance}
    check_sums(figures, {"mean": expected.mean, "variance": expected.variance})
    for change, u in zip(changes, steps, strict=True):
        check_sums({"change": change}, {"change": mean_change(rotary, view.queries_before, u)})


def test_what_has_no_kernel_is_left_to_torch(on_kernels: list[str]) -> None:
    i = torch.arange(2 * PAIRS)
    some = RotaryChannels(i[:4], i[4:8], torch.rand(4, dtype=torch.float64), i[8:])
    view = view_of(some, 13, 0)
    assert kernels.unit_vectors(view.model_queries, some, 0) is None
    model, _ = QueryModel.of_view(view, [torch.ones(HEADS, dtype=torch.int64)])
    assert torch.equal(model.mean, QueryModel.of(some, view.queries_before).mean)
    assert on_kernels == []
