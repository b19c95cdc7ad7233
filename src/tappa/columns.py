"""The columns of heads.csv: their order, their groups, and what each of them says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tappa.patterns import LABELS
from tappa.similarity import VARIANTS
from tappa.theory import BOUNDS


@dataclass(frozen=True)
class Column:
    """A statistic of a head: its name, one sentence on what it is, and what the page calls it."""

    name: str
    meaning: str
    words: str = ""  # "" where the page does not show it


_PERSISTENCE = "mean over t of Σᵢ min(A[t, i], A[t+u, i+v])"
_SPACES = {"pre": "before", "post": "after"}
_PAIRS = {"all": "all pairs", "adjacent": "adjacent pairs"}
_EXTENTS = {"prompt": "the whole prompt", "window": "the last steps only"}
_SHOWN = {"q_similarity_post_all_prompt": "q-similarity after RoPE"}


def _variants(letter: str, things: str) -> tuple[Column, ...]:
    columns = []
    for variant in VARIANTS:
        space, pairs, extent = str(variant).split("_")
        name = f"{letter}_similarity_{variant}"
        meaning = (
            f"Mean cosine of {things} {_SPACES[space]} RoPE, over {_PAIRS[pairs]} of "
            f"{_EXTENTS[extent]}."
        )
        columns.append(Column(name, meaning, _SHOWN.get(name, "")))
    return tuple(columns)


def _evidence(kind: str, source: str) -> tuple[Column, ...]:
    return tuple(
        Column(f"{kind}_scores_{label}", f"Evidence for the label {label}, 0 to 1, from {source}.")
        for label in LABELS
    )


def _tightness(bound: str) -> Column:
    ratio = "actual ÷ bound, of a lower bound" if bound == "jump" else "bound ÷ actual"
    return Column(f"tightness_{bound}", f"Median of {ratio}, over (query, key) pairs: 1 is exact.")


GROUPS: dict[str, tuple[Column, ...]] = {
    "identity": (
        Column("layer", "Layer, from 0."),
        Column("head", "Query head of the layer, from 0."),
        Column("kv_head", "KV head that the query head reads, from 0."),
    ),
    "the ten that matter": (
        Column("observed", "Label of what attention does."),
        Column("explained", "Label that queries, keys and frequencies alone lead to."),
        Column(
            "q_similarity",
            "S = mean of cos(qₛ, qₜ) over all pairs of steps s ≠ t, before RoPE: 1 when all "
            "queries point the same way.",
            "q-similarity S (before RoPE)",
        ),
        Column(
            "k_similarity",
            "Mean of cos(kₛ, kₜ) over all pairs of steps s ≠ t, before RoPE.",
            "k-similarity",
        ),
        Column(
            "predictability",
            "The best persistence under the shifts (1, 0), (1, 1), (L, L) and (L, 0): the share of "
            "attention known from an earlier row.",
            "predictability",
        ),
        Column(
            "vertical",
            f"Persistence with (u, v) = (1, 0), {_PERSISTENCE}: attention that stays on the same "
            "tokens.",
            "persistence, shift (1, 0)",
        ),
        Column(
            "diagonal",
            f"Persistence with (u, v) = (1, 1), {_PERSISTENCE}: attention that moves along with "
            "the query.",
            "persistence, shift (1, 1)",
        ),
        Column(
            "sink_mass",
            "Sink mass: mean over t of Σ A[t, i] over the first 4 tokens i, in rows past them.",
            "sink mass (attention on the first tokens)",
        ),
        Column(
            "dominant_channel",
            "The rotated RoPE channel m with most energy, mean ‖qᵐ‖ · mean ‖kᵐ‖.",
            "dominant channel",
        ),
        Column(
            "measured_period",
            "Tokens between the diagonals: the period of the mean logit by distance.",
            "period of the lag profile (tokens)",
        ),
    ),
    "attention": (
        Column(
            "heavy_mass",
            "Share of all attention on the 8 columns with most of it.",
            "attention on the 8 heaviest keys",
        ),
        Column(
            "entropy",
            "Mean over rows of −Σᵢ A[t, i] log A[t, i] ÷ log(keys that the row sees): 0 is one "
            "key, 1 is all alike.",
            "entropy of a row (0 to 1)",
        ),
    ),
    "season and period": (
        Column(
            "season",
            "The lag L after which queries and keys repeat best.",
            "season L (tokens)",
        ),
        Column(
            "seasonal",
            f"Persistence with (u, v) = (L, L), {_PERSISTENCE}.",
            "persistence, shift (L, L)",
        ),
        Column("seasonal_rows", f"Persistence with (u, v) = (L, 0), {_PERSISTENCE}."),
        Column("seasonal_columns", f"Persistence with (u, v) = (0, L), {_PERSISTENCE}."),
        Column(
            "period_strength",
            "R² of one sinusoid of that period in the mean logit by distance, without its trend.",
            "strength of the period",
        ),
        Column("measured_channel", "The rotary channel whose turn is nearest to measured_period."),
    ),
    "RoPE channel": (
        Column(
            "dominant_share",
            "Energy of the dominant channel ÷ energy of all channels.",
            "dominant channel's share of energy",
        ),
        Column(
            "frequency",
            "Angle θ by which the dominant channel turns in one token.",
            "dominant channel's frequency (radians per token)",
        ),
        Column(
            "period",
            "2π ÷ θ: tokens in which the dominant channel turns once.",
            "dominant channel's period (tokens)",
        ),
        Column(
            "angle",
            "Angle from the mean query to the mean key in the dominant channel.",
            "dominant channel's angle (radians)",
        ),
        Column(
            "alignment",
            "‖mean qᵐ‖ · ‖mean kᵐ‖ ÷ (mean ‖qᵐ‖ · mean ‖kᵐ‖) in the dominant channel m: 1 when "
            "neither changes its direction.",
            "dominant channel's alignment",
        ),
        Column(
            "unrotated_share",
            "Share of energy in dimensions that RoPE does not turn.",
            "energy without RoPE",
        ),
    ),
    "expected of queries, keys and RoPE alone": (
        Column(
            "expected_predictability",
            "The best persistence that the query model expects under any of the shifts.",
            "expected predictability",
        ),
        Column(
            "expected_vertical",
            "Persistence under (1, 0) that the query model expects.",
            "expected persistence (1, 0)",
        ),
        Column(
            "expected_diagonal",
            "Persistence under (1, 1) that the query model expects.",
            "expected persistence (1, 1)",
        ),
        Column("expected_seasonal", "Persistence under (L, L) that the query model expects."),
        Column("expected_seasonal_rows", "Persistence under (L, 0) that the query model expects."),
        Column("expected_sink_mass", "Sink mass that the query model expects."),
        Column("expected_period", "Period of the logits by distance of mean query and mean key."),
        Column("expected_period_strength", "R² of one sinusoid of that expected period."),
    ),
    "bounds": (
        Column("bounds_checked", "(query, key) pairs on which a bound was tried."),
        Column(
            "bound_violations",
            "(query, key) pairs on which a bound failed beyond rounding.",
            "bound violations",
        ),
        *(_tightness(bound) for bound in BOUNDS),
    ),
    "q-similarity, all variants": _variants("q", "queries"),
    "k-similarity, all variants": _variants("k", "keys"),
    "evidence for labels": (
        *_evidence("observed", "what attention does"),
        *_evidence("explained", "queries, keys and RoPE alone"),
    ),
}
COLUMNS = {column.name: column for group in GROUPS.values() for column in group}
TERMS = {  # words of the page that are no column's own, and the column whose meaning they have
    "S": "q_similarity",
    "sink mass": "sink_mass",
    "alignment": "alignment",
    "persistence": "vertical",
    "persists": "vertical",
    "bound ÷ actual": "tightness_vertical",
    "energy": "dominant_channel",
    "explained": "explained",
    "observed": "observed",
}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of columns in the order of the groups; those of no group come last."""
    places = {name: place for place, name in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: places.get(name, len(places)))


def value_of(head: Mapping[str, Any], column: str) -> Any:
    """What a head of an Analysis has in a column of heads.csv; None where it has none."""
    for kind in ("observed_scores", "explained_scores"):
        if column.startswith(f"{kind}_"):
            scores = head.get(kind)
            return scores.get(column.removeprefix(f"{kind}_")) if isinstance(scores, dict) else None
    return head.get(column)
