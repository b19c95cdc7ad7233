import pandas as pd
import pytest

from tappa.patterns import (
    LABELS,
    THRESHOLDS,
    Thresholds,
    agreement,
    explain,
    label,
    name_patterns,
    scores,
    spearman,
)

FIGURES = {
    "vertical": 0.9,
    "diagonal": 0.6,
    "seasonal": 0.2,
    "seasonal_rows": 0.3,
    "period_strength": 0.5,
    "expected_vertical": 0.1,
    "expected_diagonal": 0.8,
    "expected_seasonal": 0.4,
    "expected_seasonal_rows": 0.3,
    "expected_period_strength": 0.25,
}


def evidence(
    vertical: float = 0.0, diagonal: float = 0.0, periodic: float = 0.0, seasonal: float = 0.0
) -> dict[str, float]:
    return {
        "re-access": vertical,
        "sequential": diagonal,
        "periodic": periodic,
        "seasonal": seasonal,
        "unpredictable": 1 - max(vertical, diagonal, seasonal),
    }


def test_scores_by_hand() -> None:
    assert scores(FIGURES) == {
        "re-access": 0.9,
        "sequential": 0.6,
        "periodic": 0.3,
        "seasonal": 0.3,
        "unpredictable": pytest.approx(0.1),
    }
    assert scores(FIGURES, "expected_") == {
        "re-access": 0.1,
        "sequential": 0.8,
        "periodic": 0.2,
        "seasonal": 0.4,
        "unpredictable": pytest.approx(0.2),
    }


def test_name_patterns_labels_both_sides() -> None:
    named = name_patterns(FIGURES)
    assert (named["observed"], named["explained"]) == ("re-access", "sequential")
    assert named["expected_predictability"] == pytest.approx(0.8)
    assert named["observed_scores"] == scores(FIGURES)
    assert named["explained_scores"] == scores(FIGURES, "expected_")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (evidence(vertical=0.8, diagonal=0.6), "re-access"),
        (evidence(vertical=0.6, diagonal=0.8, periodic=0.2), "sequential"),
        (evidence(vertical=0.6, diagonal=0.8, periodic=0.7), "periodic"),
        (evidence(vertical=0.3, diagonal=0.4, seasonal=0.7), "seasonal"),
        (evidence(vertical=0.3, diagonal=0.4, seasonal=0.2), "unpredictable"),
        (evidence(), "unpredictable"),
        (evidence(vertical=1.0), "re-access"),
    ],
)
def test_every_label(given: dict[str, float], expected: str) -> None:
    assert label(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (evidence(vertical=0.5), "re-access"),
        (evidence(vertical=0.499), "unpredictable"),
        (evidence(diagonal=0.5), "sequential"),
        (evidence(diagonal=0.499), "unpredictable"),
        (evidence(seasonal=0.5), "seasonal"),
        (evidence(seasonal=0.499), "unpredictable"),
        (evidence(vertical=0.75, seasonal=0.75 + THRESHOLDS.seasonal_gain), "re-access"),
        (evidence(vertical=0.75, seasonal=0.851), "seasonal"),
        (evidence(diagonal=0.75, seasonal=0.849), "sequential"),
        (evidence(diagonal=0.75, seasonal=0.851), "seasonal"),
        (evidence(diagonal=0.8, periodic=0.4), "periodic"),
        (evidence(diagonal=0.8, periodic=0.399), "sequential"),
    ],
)
def test_thresholds_at_the_edge(given: dict[str, float], expected: str) -> None:
    assert label(given) == expected


def test_ties_go_to_the_simpler_pattern() -> None:
    assert label(evidence(vertical=0.8, diagonal=0.8, periodic=0.8)) == "re-access"
    assert label(evidence(vertical=0.8, seasonal=0.8)) == "re-access"
    assert label(evidence(diagonal=0.8, seasonal=0.8)) == "sequential"


def test_other_thresholds() -> None:
    strict = Thresholds(predictable=0.9, periodic=0.9, seasonal_gain=0.5)
    assert label(evidence(vertical=0.8), strict) == "unpredictable"
    assert label(evidence(diagonal=0.95, periodic=0.7), strict) == "sequential"
    assert label(evidence(vertical=0.5, seasonal=0.95), strict) == "re-access"


def heads() -> pd.DataFrame:
    """Five heads; the ranks of the columns are easy to compare by hand."""
    return pd.DataFrame(
        {
            "observed": ["re-access", "re-access", "sequential", "sequential", "unpredictable"],
            "explained": ["re-access", "sequential", "sequential", "sequential", "periodic"],
            "q_similarity": [0.1, 0.2, 0.3, 0.4, 0.5],
            "predictability": [0.2, 0.1, 0.4, 0.3, 0.9],  # d^2 = 4: 1 - 6 * 4 / (5 * 24) = 0.8
            "expected_predictability": [0.5, 0.4, 0.3, 0.2, 0.1],  # d^2 = 36: -0.8
            "vertical": [0.1, 0.2, 0.3, 0.4, 0.5],
            "expected_vertical": [0.01, 0.02, 0.5, 0.6, 0.7],  # same order
            "diagonal": [0.1, 0.2, 0.3, 0.4, 0.5],
            "expected_diagonal": [0.3] * 5,  # constant
            "period_strength": [0.1, 0.2, 0.3, 0.4, 0.5],
            "expected_period_strength": [0.5, 0.4, 0.3, 0.2, 0.1],  # the other way round
        }
    )


def test_agreement_by_hand() -> None:
    found = agreement(heads())
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["labels_observed"] == 3
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["spearman_q_similarity_predictability"] == pytest.approx(0.8)
    assert found["spearman_expected_predictability"] == pytest.approx(-0.8)
    assert found["spearman_expected_vertical"] == pytest.approx(1)
    assert found["spearman_expected_diagonal"] is None
    assert found["spearman_expected_period_strength"] == pytest.approx(-1)


def test_confusion_has_observed_labels_as_rows() -> None:
    confusion = agreement(heads())["confusion"]
    assert set(confusion) == set(LABELS)
    assert all(set(row) == set(LABELS) for row in confusion.values())
    assert confusion["re-access"]["re-access"] == 1
    assert confusion["re-access"]["sequential"] == 1
    assert confusion["sequential"]["sequential"] == 2
    assert confusion["sequential"]["re-access"] == 0
    assert confusion["unpredictable"]["periodic"] == 1
    assert sum(sum(row.values()) for row in confusion.values()) == 5


def test_agreement_of_no_heads() -> None:
    found = agreement(heads()[:0])
    assert (found["accuracy"], found["balanced_accuracy"], found["labels_observed"]) == (0, None, 0)
    assert found["spearman_expected_vertical"] is None


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0], 0.8),
        ([1.0, 2.0, 3.0], [1.0, 8.0, 27.0], 1.0),
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], 0.75**0.5),  # ranks 1.5, 1.5, 3
        ([1.0, None, 3.0, 4.0], [1.0, 9.0, 5.0, 3.0], 0.5),  # without the missing one
    ],
)
def test_spearman_by_hand(x: list, y: list, expected: float) -> None:
    assert spearman(pd.DataFrame({"x": x, "y": y}), "x", "y") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        ([1.0], [2.0]),
        ([1.0, None], [2.0, 3.0]),
        ([None, None], [2.0, 3.0]),
    ],
)
def test_spearman_is_none_where_it_is_not_defined(x: list, y: list) -> None:
    assert spearman(pd.DataFrame({"x": x, "y": y}), "x", "y") is None


def described(observed: str, **changes: object) -> str:
    figures = {
        "observed": observed,
        "dominant_share": 0.25,
        "dominant_channel": 7,
        "period": 1234.5,
        "vertical": 0.91,
        "diagonal": 0.62,
        "sink_mass": 0.73,
        "measured_period": 14.94,
        "measured_channel": 2,
        "season": 17,
        "predictability": 0.31,
    }
    return explain({**figures, **changes})


@pytest.mark.parametrize(
    ("observed", "sentence"),
    [
        ("re-access", "keeps 91% on the same tokens, 73% on the first"),
        ("sequential", "moves along, 62% one token on"),
        ("periodic", "diagonals every 14.9 tokens, as channel 2 turns"),
        ("seasonal", "repeats after 17 tokens"),
        ("unpredictable", "only 31% known from the past"),
    ],
)
def test_explain_has_a_sentence_for_each_label(observed: str, sentence: str) -> None:
    why = "; 25% of energy in channel 7, one turn in 1,234 tokens"
    assert described(observed) == sentence + ("" if observed == "periodic" else why)
    assert described(observed, period=None, dominant_share=None) == sentence


def test_explain_mentions_only_a_sink_worth_mentioning() -> None:
    assert "20% on the first" in described("re-access", sink_mass=0.2)
    assert "on the first" not in described("re-access", sink_mass=0.19)
