"""Sums of unit queries before RoPE: the kernel against the formula."""

import pytest
import torch

from tappa.kernels.unit_queries import unit_query_sums_reference, unit_query_sums_triton
from tappa.rope import RotaryChannels
from tappa.similarity import self_similarity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def channels(pairs: int, rest: int, interleaved: bool = False) -> RotaryChannels:
    first = 2 * torch.arange(pairs) if interleaved else torch.arange(pairs)
    second = first + (1 if interleaved else pairs)
    theta = 10.0 ** -torch.linspace(0, 3, pairs, dtype=torch.float64)
    return RotaryChannels(first, second, theta, torch.arange(2 * pairs, 2 * pairs + rest))


@pytest.mark.parametrize(("pairs", "rest", "interleaved"), [(5, 0, False), (3, 7, True)])
@pytest.mark.parametrize("tokens", [1, 64, 131])
def test_the_kernel_is_the_formula(pairs: int, rest: int, interleaved: bool, tokens: int) -> None:
    rotary = channels(pairs, rest, interleaved).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(tokens, 3, rotary.dim, generator=generator).to(DEVICE).transpose(0, 1)
    queries[1, 0] = 0  # a vector without direction
    table = rotary.table(torch.arange(1000, 1000 + tokens, device=DEVICE))
    total, squares = unit_query_sums_triton(queries, table, rotary)
    expected, count = unit_query_sums_reference(queries, table, rotary)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(squares, count, atol=1e-5, rtol=1e-5)
    if pairs == 3:  # the same channels in an order that is no slice
        mixed = torch.tensor([2, 0, 1], device=DEVICE)
        first, second, theta = (x[mixed] for x in (rotary.first, rotary.second, rotary.theta))
        rotary = RotaryChannels(first, second, theta, rotary.unrotated)
        assert rotary.evenly is None
        table = rotary.table(torch.arange(1000, 1000 + tokens, device=DEVICE))
        torch.testing.assert_close(
            unit_query_sums_triton(queries, table, rotary)[0], expected, atol=1e-5, rtol=1e-5
        )
    assert squares.tolist() == pytest.approx([tokens, tokens - 1, tokens], abs=1e-4)


def test_bfloat16_gives_the_similarity_of_the_queries_before_rope() -> None:
    rotary = channels(64, 0).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    before = 1 + torch.randn(2, 193, 128, generator=generator).to(DEVICE)
    positions = torch.arange(193, device=DEVICE)
    after = rotary.rotate(before, positions).bfloat16()
    total, squares = unit_query_sums_triton(after, rotary.table(positions), rotary)
    actual = (total.square().sum(-1) - squares) / (193 * 192)
    torch.testing.assert_close(actual, self_similarity(before), atol=1e-3, rtol=1e-3)
