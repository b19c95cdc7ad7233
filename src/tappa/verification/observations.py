"""What the paper observed of heads, as numbers with intervals: the heads are the samples."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import bootstrap, mannwhitneyu, rankdata, spearmanr

from tappa.analysis import Analysis
from tappa.similarity import VARIANTS
from tappa.verification.seasons import MovedResonance, RepeatingPrompt, Resonance

RESAMPLES = 2_000


@dataclass(frozen=True)
class Observation:
    """A figure with its bootstrap 95% interval over heads, and on how many heads it rests.

    `value` is None where the model has no heads to compare.
    """

    claim: str
    variant: str
    figure: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive head scores above another one, ties counting half.

    >>> auroc(np.array([1.0, 2.0, 3.0, 3.0]), np.array([False, True, False, True]))
    0.625
    """
    yes, no = scores[positive], scores[~positive]
    return float(mannwhitneyu(yes, no).statistic / (len(yes) * len(no)))


def observe(analysis: Analysis, tokens: int) -> list[Observation]:
    """Claims (a) to (c), in every variant of S where that matters."""
    frame = analysis.to_frame()
    found = []
    for variant in VARIANTS:
        s = frame[f"q_similarity_{variant}"].to_numpy(float)
        predictable = (frame["observed"] != "unpredictable").to_numpy()
        found.append(_auroc("a: S separates predictable heads", str(variant), s, predictable))
        strength = frame["predictability"].to_numpy(float)
        found.append(_spearman("a: S goes with predictability", str(variant), s, strength))
    reaccess = (frame["observed"] == "re-access").to_numpy()
    s, k = (frame[name].to_numpy(float) for name in ("q_similarity", "k_similarity"))
    default = "pre_all_prompt"
    found.append(_auroc("b: re-access heads have high S", default, s, reaccess))
    slow = frame["period"].astype(float).to_numpy()
    found.append(_auroc("b: their dominant channel is slow", "", slow, reaccess))
    found.append(
        Observation(
            "b: their dominant channel turns less than once in the prompt",
            "",
            "share of heads",
            float((slow[reaccess] > tokens).mean()) if reaccess.any() else None,
            n=int(reaccess.sum()),
        )
    )
    sequential = frame["observed"].isin(["sequential", "periodic"]).to_numpy()
    found.append(_auroc("c: sequential heads have high S", default, s, sequential))
    found.append(_auroc("c: sequential heads have high k-similarity", default, k, sequential))
    return found


def stability(analyses: Mapping[str, Analysis]) -> list[Observation]:
    """Claim (d): rank correlation of the heads' S between kinds of text, in every variant."""
    frames = {kind: analysis.to_frame() for kind, analysis in analyses.items()}
    found = []
    for variant in VARIANTS:
        name = f"q_similarity_{variant}"
        values = {kind: frame[name].to_numpy(float) for kind, frame in frames.items()}
        pairs = list(itertools.combinations(values, 2))
        ranks = [float(spearmanr(values[a], values[b]).statistic) for a, b in pairs]
        if ranks:
            heads = len(next(iter(values.values())))
            claim = f"d: S is stable over {' '.join(values)}"
            least = "Spearman, least of all pairs"
            found.append(Observation(claim, str(variant), least, min(ranks), n=heads))
    return found


def repeats(prompt: RepeatingPrompt, seen: Resonance) -> list[Observation]:
    """Claim (e) on one prompt: do heads repeat, and do logits change as RoPE says?

    The change of logits after L keys, mean over lags L, is compared over heads with what all
    channels and what the dominant channel alone let expect.
    """
    claim = f"e: {prompt.kind}: "
    season, change = seen.curves("season"), seen.curves("change").mean(1)
    found = [
        _median(
            claim + "queries and keys repeat", "cosine, median", seen.curves("repeats").mean(1)
        ),
        Observation(
            claim + "the season found is a multiple of it",
            "",
            "share of heads",
            float((season % prompt.period == 0).mean()),
            n=len(season),
        ),
    ]
    for name, words in (
        ("all_channels", "all channels say"),
        ("dominant", "the dominant one says"),
    ):
        figure = _spearman(
            claim + f"logits change as {words}", "", change, seen.curves(name).mean(1)
        )
        found.append(figure)
    return found


def resonates(moved: Sequence[MovedResonance]) -> list[Observation]:
    """Claim (e) on heads with a fast dominant channel: over lags, do logits repeat at resonance?

    The rank correlation over lags L of the change with `chord(L theta)`, and as a control with L.
    """
    if not moved:
        return []
    change, expected, lags = (
        np.array([getattr(x, name) for x in moved], float)
        for name in ("change", "expected", "lags")
    )
    claim, figure = "e: dominant channel moved: logits repeat ", "Spearman over lags, median"
    return [
        _median(claim + "at its resonance", figure, rank_correlations(change, expected)),
        _median(claim + "after fewer tokens (control)", figure, rank_correlations(change, lags)),
    ]


def rank_correlations(
    x: Float[np.ndarray, "heads lags"], y: Float[np.ndarray, "heads lags"]
) -> Float[np.ndarray, " heads"]:
    """Spearman's coefficient of every line; NaN where one is constant."""
    a, b = (rankdata(v, axis=1) for v in (x, y))
    a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
    below = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), below, out=np.full(len(a), np.nan), where=below > 0)


def _median(claim: str, figure: str, values: np.ndarray) -> Observation:
    known = values[np.isfinite(values)]
    if not len(known):
        return Observation(claim, "", figure, None)
    draws = np.random.default_rng(0).choice(known, (RESAMPLES, len(known)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return Observation(
        claim, "", figure, float(np.median(known)), float(low), float(high), len(known)
    )


def _auroc(claim: str, variant: str, x: np.ndarray, positive: np.ndarray) -> Observation:
    known = np.isfinite(x)
    x, positive = x[known], positive[known]
    if not positive.any() or positive.all():
        return Observation(claim, variant, "AUROC", None, n=len(x))
    rng, draws = np.random.default_rng(0), []
    yes, no = x[positive], x[~positive]
    labels = np.arange(len(x)) < len(yes)
    for _ in range(RESAMPLES):
        sample = np.concatenate([rng.choice(yes, len(yes)), rng.choice(no, len(no))])
        draws.append(auroc(sample, labels))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Observation(claim, variant, "AUROC", auroc(x, positive), float(low), float(high), len(x))


def _spearman(claim: str, variant: str, x: np.ndarray, y: np.ndarray) -> Observation:
    frame = pd.DataFrame({"x": x, "y": y}).dropna()
    x, y = frame["x"].to_numpy(), frame["y"].to_numpy()
    if len(frame) < 3 or frame.nunique().min() < 2:
        return Observation(claim, variant, "Spearman", None, n=len(frame))
    done = bootstrap(
        (x, y),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,
    ).confidence_interval
    value = float(spearmanr(x, y).statistic)
    return Observation(claim, variant, "Spearman", value, float(done.low), float(done.high), len(x))
