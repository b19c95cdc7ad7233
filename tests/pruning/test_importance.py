"""Formulas and orders: against published scores, and numbers that one can compute by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tappa.errors import PruningError
from tappa.pruning import (
    ORDERS,
    Calibration,
    Known,
    bi_prime,
    group_importance,
    head_importance,
    layers_to_remove,
    normalised,
)
from tappa.pruning.orders import layer_count

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "data" / "pruning_llama2_7b.json").read_text(encoding="utf-8")
)
BI, S = np.array(PUBLISHED["bi"]), np.array(PUBLISHED["q_similarity"])


def known(count: int = 2, **changes: Any) -> Known:
    """Five layers: BI' with beta .5 is [1.5, .25 + .5, 0 + .25, .25, 1]."""
    influence = np.array([1.25, 0.5, 0.25, 0.5, 0.75])
    similarity = np.array([0.25, 0.25, 0.5, 0.75, 0.25])
    settings: dict[str, Any] = {"beta": 0.5} | changes
    return Known(influence, similarity, count, **settings)


def test_published_orders_of_llama_2_7b() -> None:
    """arXiv 2601.21709: scores and orders that the authors published."""
    everything = Known(BI, S, len(BI) - 1, PUBLISHED["beta"])
    assert layers_to_remove("bi", everything) == PUBLISHED["order_bi"][:-1]
    assert layers_to_remove("bi_prime", everything) == PUBLISHED["order_bi_prime"][:-1]
    assert PUBLISHED["order_bi"] != PUBLISHED["order_bi_prime"]


def test_bi_prime_by_hand() -> None:
    influence, similarity = known().influence, known().similarity
    expected = [1 + 0.5, 0.25 + 0.5, 0 + 0.25, 0.25 + 0, 0.5 + 0.5]
    np.testing.assert_allclose(bi_prime(influence, similarity, 0.5), expected)
    np.testing.assert_allclose(bi_prime(influence, similarity, 0.0), normalised(influence))
    np.testing.assert_allclose(bi_prime(influence, np.full(5, 0.7), 2.0), normalised(influence) + 2)
    for beta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(PruningError, match="beta >= 0"):
            bi_prime(influence, similarity, beta)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("bi", [2, 1, 3, 4, 0]),  # 1 and 3 tie: the lower index first
        ("bi_prime", [2, 3, 1, 4, 0]),  # 2 and 3 tie
        ("reverse", [0, 4, 1, 2, 3]),
        ("q_similarity", [3, 2, 0, 1, 4]),
    ],
)
def test_orders_by_hand(order: str, expected: list[int]) -> None:
    for count in range(5):
        assert layers_to_remove(order, known(count)) == expected[:count]


def test_uniform_is_evenly_spread() -> None:
    assert [layers_to_remove("uniform", known(n)) for n in range(5)] == [
        [],
        [2],
        [1, 3],
        [0, 2, 4],
        [0, 1, 3, 4],
    ]


def test_random_is_the_same_for_the_same_seed() -> None:
    draws = [tuple(layers_to_remove("random", known(4, seed=seed))) for seed in range(20)]
    assert draws == [tuple(layers_to_remove("random", known(4, seed=s))) for s in range(20)]
    assert len(set(draws)) > 10
    assert layers_to_remove("random", known(2, seed=3)) == list(draws[3][:2])


def test_greedy_removes_what_hurts_least_and_measures_again() -> None:
    """Layer 1 hurts least; without it, 4 hurts less than 3, which alone is the better one."""
    alone = {0: 9.0, 1: 1.0, 2: 7.0, 3: 2.0, 4: 3.0}
    asked: list[list[int]] = []

    def measure(gone: Any) -> float:
        asked.append(list(gone))
        extra = 5.0 if {1, 3} <= set(gone) else 0.0
        return sum(alone[layer] for layer in gone) + extra

    assert layers_to_remove("greedy", known(3, measure=measure)) == [1, 4, 2]
    assert asked[:6] == [[0], [1], [2], [3], [4], [1, 0]]
    assert len(asked) == 5 + 4 + 3


@given(st.sampled_from([o for o in ORDERS if o != "greedy"]), st.integers(1, 40), st.data())
def test_every_order_names_each_layer_once(order: str, layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, layers - 1))
    figures = st.lists(st.floats(0, 1), min_size=layers, max_size=layers)
    scores = [np.array(data.draw(figures)) for _ in range(2)]
    found = layers_to_remove(order, Known(scores[0], scores[1], count))
    assert len(found) == len(set(found)) == count
    assert all(0 <= layer < layers for layer in found)


@pytest.mark.parametrize(
    ("wanted", "layers", "count"),
    [
        *((0, 7, 0), (3, 7, 3), (0.2, 30, 6), (0.1, 30, 3), (0.29, 100, 29), (0.34, 3, 1)),
        *((0.01, 30, 1), (0.99, 30, 29), (0.5, 7, 3)),
    ],
)
def test_a_share_of_layers_is_rounded_down_to_one_at_least(
    wanted: float, layers: int, count: int
) -> None:
    assert layer_count(wanted, layers) == count


@pytest.mark.parametrize("wanted", [0.0, 1.0, -0.2, 20.0, float("nan"), float("inf")])
def test_what_is_no_share_of_layers(wanted: float) -> None:
    with pytest.raises(PruningError, match=f"above 0 and below 1, got {wanted!r}"):
        layer_count(wanted, 30)


def test_what_cannot_be_ordered() -> None:
    with pytest.raises(PruningError, match="did you mean 'bi_prime'"):
        layers_to_remove("bi_prim", known())
    with pytest.raises(PruningError, match="got 'first'"):
        layers_to_remove("first", known())
    for count in (5, 6, 700):
        with pytest.raises(PruningError, match=f"cannot remove {count} of 5 layers"):
            layers_to_remove("bi", known(count))
    with pytest.raises(PruningError, match=r"0 or more, or a share as 0\.2, got -1"):
        layers_to_remove("bi", known(-1))


def calibration() -> Calibration:
    """Two layers of four query heads, two windows of 5 tokens."""
    return Calibration(
        model={"name": "m", "class": "M", "layers": 2, "heads": 4, "kv_heads": 2, "dtype": "x"},
        settings={"window": 5, "stride": 5},
        windows=2,
        tokens=10,
        cosines=np.array([9.0, 5.0]),
        similarity=np.array([[2.0, 1.0, 0.0, 1.0], [1.0, 1.0, 2.0, 0.0]]),
        output=np.array([[10.0, 20.0, 30.0, 40.0], [50.0, 10.0, 10.0, 10.0]]),
    )


def test_figures_of_a_calibration_by_hand() -> None:
    one = calibration()
    np.testing.assert_allclose(one.block_influence, [0.1, 0.5])
    np.testing.assert_allclose(one.layer_similarity, [0.5, 0.5])
    np.testing.assert_allclose(one.head_output[0], [1, 2, 3, 4])


def test_head_importance_by_hand() -> None:
    one = calibration()
    apart = head_importance(one, "dissimilarity")
    np.testing.assert_allclose(apart, [[0, 0.5, 1, 0.5], [0.5, 0.5, 0, 1]])
    np.testing.assert_allclose(head_importance(one, "output"), [[1, 2, 3, 4], [5, 1, 1, 1]])
    mix = [[0, 0.375, 0.75, 0.625], [0.75, 0.25, 0, 0.5]]
    np.testing.assert_allclose(head_importance(one, "mix"), mix)
    np.testing.assert_allclose(head_importance(one), head_importance(one, "output"))
    np.testing.assert_allclose(head_importance(one, "mix", 0.0), apart)
    np.testing.assert_allclose(group_importance(apart, 2), [[0.25, 0.75], [0.5, 0.5]])
    with pytest.raises(PruningError, match="share from 0 to 1"):
        head_importance(one, "mix", 1.5)
