"""Names for what a head does: the labels, the rules that give them, and how well they agree.

The same rules name the *observed* pattern, from how much of the real attention persists, and the
*explained* one, from how much should persist according to queries, keys and frequencies alone
(query_model). Both are shares of attention between 0 and 1, so no rule needs fitting to a model.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

LABELS = ("re-access", "sequential", "periodic", "seasonal", "unpredictable")


@dataclass(frozen=True)
class Thresholds:
    """Every number that the rules use."""

    predictable: float = 0.5  # at least half of a row of attention is known from an earlier row
    periodic: float = 0.5  # one sinusoid makes at least half of the swing of the lag profile
    seasonal_gain: float = 0.1  # L steps ago tells more than one step ago, beyond sampling error


THRESHOLDS = Thresholds()


def scores(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Evidence for each label, 0 to 1; `prefix` is "" (observed) or "expected_".

    re-access: persistence under (1, 0) (Theorem 5.1); sequential: under (1, 1) (5.2); periodic:
    sequential evidence times the periodicity of the lag profile (5.3); seasonal: the better of
    (L, L) and (L, 0) (5.4); unpredictable: what no shift keeps (Proposition 4.1).
    """
    vertical, diagonal = figures[f"{prefix}vertical"], figures[f"{prefix}diagonal"]
    seasonal = max(figures[f"{prefix}seasonal"], figures[f"{prefix}seasonal_rows"])
    return {
        "re-access": vertical,
        "sequential": diagonal,
        "periodic": diagonal * figures[f"{prefix}period_strength"],
        "seasonal": seasonal,
        "unpredictable": 1 - max(vertical, diagonal, seasonal),
    }


def label(evidence: Mapping[str, float], thresholds: Thresholds = THRESHOLDS) -> str:
    """The label of a head with these scores; ties go to the simpler pattern."""
    vertical, diagonal = evidence["re-access"], evidence["sequential"]
    if max(vertical, diagonal, evidence["seasonal"]) < thresholds.predictable:
        return "unpredictable"
    if evidence["seasonal"] > max(vertical, diagonal) + thresholds.seasonal_gain:
        return "seasonal"
    if vertical >= diagonal:
        return "re-access"
    return "periodic" if evidence["periodic"] >= thresholds.periodic * diagonal else "sequential"


def name_patterns(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and scores of one head, observed and explained, to be added to its figures."""
    observed, explained = scores(figures), scores(figures, "expected_")
    return {
        "expected_predictability": 1 - explained["unpredictable"],
        "observed": label(observed),
        "explained": label(explained),
        "observed_scores": observed,
        "explained_scores": explained,
    }


def agreement(heads: pd.DataFrame) -> dict[str, Any]:
    """How well explained predicts observed, over all heads.

    `confusion[observed][explained]` counts heads. `balanced_accuracy` is the mean, over observed
    labels that occur, of the share of their heads that is explained so. `spearman_*` are rank
    correlations over heads (None where one side is constant).
    """
    counts = Counter(zip(heads["observed"], heads["explained"], strict=True))
    confusion = {o: {e: counts[o, e] for e in LABELS} for o in LABELS}
    recalls = [row[o] / sum(row.values()) for o, row in confusion.items() if sum(row.values())]
    return {
        "accuracy": sum(counts[name, name] for name in LABELS) / max(len(heads), 1),
        "balanced_accuracy": sum(recalls) / len(recalls) if recalls else None,
        "labels_observed": len(recalls),
        "spearman_q_similarity_predictability": spearman(heads, "q_similarity", "predictability"),
        "spearman_expected_predictability": spearman(
            heads, "expected_predictability", "predictability"
        ),
        "spearman_expected_vertical": spearman(heads, "expected_vertical", "vertical"),
        "spearman_expected_diagonal": spearman(heads, "expected_diagonal", "diagonal"),
        "spearman_expected_period_strength": spearman(
            heads, "expected_period_strength", "period_strength"
        ),
        "confusion": confusion,
    }


def spearman(heads: pd.DataFrame, x: str, y: str) -> float | None:
    """Rank correlation of two columns, None where it is not defined."""
    ranks = heads[[x, y]].astype(float).dropna().rank()
    if len(ranks) < 2 or (ranks.nunique() < 2).any():
        return None
    return float(ranks.corr().iloc[0, 1])


def explain(figures: Mapping[str, Any]) -> str:
    """One sentence in plain words: what the head does, and why."""
    share, turn = figures["dominant_share"], figures["period"]
    why = ""
    if turn is not None and figures["observed"] != "periodic":  # whose channel is named already
        channel = figures["dominant_channel"]
        why = f"; {share:.0%} of energy in channel {channel}, one turn in {turn:,.0f} tokens"
    what = {
        "re-access": f"keeps {figures['vertical']:.0%} on the same tokens"
        + (f", {figures['sink_mass']:.0%} on the first" if figures["sink_mass"] >= 0.2 else ""),
        "sequential": f"moves along, {figures['diagonal']:.0%} one token on",
        "periodic": f"diagonals every {figures['measured_period'] or 0:.1f} tokens"
        + f", as channel {figures['measured_channel']} turns",
        "seasonal": f"repeats after {figures['season']} tokens",
        "unpredictable": f"only {figures['predictability']:.0%} known from the past",
    }
    return what[figures["observed"]] + why
