"""From the sums of a layer to the figures of its heads."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from tappa.layer_statistics import LayerStatistics
from tappa.rope import period
from tappa.similarity import DEFAULT, VARIANTS
from tappa.theory import BOUNDS, median_tightness

Figures = dict[str, Any]


def head_figures(statistics: LayerStatistics) -> list[Figures]:
    """One dictionary of figures for every query head of a layer (see docs/analysis-file.md)."""
    heads = len(statistics.sums["sink_mass"])
    return [
        {"layer": statistics.layer, "head": h}
        | _similarities(statistics.sums, h)
        | _channel_figures(statistics, h)
        | _attention_figures(statistics, h)
        | _expected(statistics, h)
        | _bound_figures(statistics.sums, h)
        for h in range(heads)
    ]


def kv_head(sums: dict[str, np.ndarray], head: int) -> int:
    """The KV head that a query head reads."""
    return head // (len(sums["q_cosines_pre_all_prompt"]) // len(sums["k_cosines_pre_all_prompt"]))


def _similarities(sums: dict[str, np.ndarray], h: int) -> Figures:
    """q- and k-similarity in every variant; the default one also under its plain name."""
    out: Figures = {"kv_head": kv_head(sums, h), "q_similarity": None, "k_similarity": None}
    for name, row in (("q", h), ("k", kv_head(sums, h))):
        for variant in VARIANTS:
            pairs = float(sums[f"{name}_pairs_{variant}"])
            cosines = float(sums[f"{name}_cosines_{variant}"][row])
            value = cosines / pairs if pairs else None
            out[f"{name}_similarity_{variant}"] = value
            if variant == DEFAULT:
                out[f"{name}_similarity"] = value
    return out


def _channel_figures(statistics: LayerStatistics, h: int) -> Figures:
    """The dominant RoPE channel: share of energy, frequency, angle, alignment, period.

    Energy of channel m is `mean_t |q_t^m| * mean_i |k_i^m|`; the dominant channel is the rotated
    one with the most, its share is of all channels, those not rotated included. `angle` is that
    from the mean query to the mean key in it, `alignment` their length relative to the mean norms.
    """
    energy, theta = statistics.sums["energy"][h], statistics.theta
    if not theta:
        return dict.fromkeys(
            ("dominant_channel", "dominant_share", "frequency", "period", "angle", "alignment")
        ) | {"unrotated_share": 1.0}
    m = int(energy[: len(theta)].argmax())
    total = float(energy.sum()) or 1.0
    align = complex(*statistics.sums["align"][h, m])
    return {
        "dominant_channel": m,
        "dominant_share": float(energy[m]) / total,
        "frequency": theta[m],
        "period": period(theta[m]) if theta[m] > 0 else None,
        "angle": math.atan2(align.imag, align.real),
        "alignment": abs(align) / (float(energy[m]) or 1.0),
        "unrotated_share": float(energy[len(theta) :].sum()) / total,
    }


def _attention_figures(statistics: LayerStatistics, h: int) -> Figures:
    """What attention does, from its sums over rows."""
    sums = statistics.sums
    rows, pairs = float(sums["rows"]), max(float(sums["pairs"]), 1.0)
    sampled = float(sums["seasonal_rows"][h])
    season = int(sums["season_votes"][h].argmax())
    seasonal, seasonal_rows, seasonal_columns = (
        sums["observed"][h] / sampled if sampled else (0.0,) * 3
    )
    measured, strength = lag_period(*lag_profile(sums, h, "lag_logits"))
    figures: Figures = {
        "sink_mass": float(sums["sink_mass"][h]) / max(float(sums["sink_rows"]), 1.0),
        "heavy_mass": float(sums["heavy_mass"][h]) / rows,
        "entropy": float(sums["entropy"][h]) / rows,
        "vertical": float(sums["vertical"][h]) / pairs,
        "diagonal": float(sums["diagonal"][h]) / pairs,
        "season": season or None,
        "seasonal": float(seasonal),
        "seasonal_rows": float(seasonal_rows),
        "seasonal_columns": float(seasonal_columns),
        "measured_period": measured,
        "measured_channel": channel_of(measured, statistics.theta),
        "period_strength": strength,
    }
    shifts = ("vertical", "diagonal", "seasonal", "seasonal_rows")
    return figures | {"predictability": max(figures[name] for name in shifts)}


def lag_profile(
    sums: dict[str, np.ndarray], h: int, name: str = "lag_attention"
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, number of pairs) of attention or logits at every distance t - i of one head."""
    counts = sums["lag_counts"].astype(float)
    return sums[name][h] / np.maximum(counts, 1), counts


def lag_period(mean: np.ndarray, counts: np.ndarray) -> tuple[float | None, float]:
    """(period, strength) of the diagonals in a lag profile.

    The profile, over distances with at least a quarter of the pairs, is freed of a quadratic
    trend; the period between 2 and a third of the range whose sinusoid explains most of the rest
    is refined by parabolic interpolation of its spectrum. Strength is that R^2 (0 to 1).
    """
    used = mean[1 : int((counts >= counts.max() / 4).sum())]
    n = len(used)
    if n < 8 or not np.isfinite(used).all():
        return None, 0.0
    trend = _trends(n)
    rest = used - trend @ (trend.T @ used)
    total = float(rest @ rest)
    if total <= n * (1e-9 * np.abs(used).max()) ** 2:  # flat, but for rounding
        return None, 0.0
    power = np.abs(np.fft.rfft(rest * np.hanning(n), n=8 * n)) ** 2
    low, high = 24, 4 * n  # cycles in 8 n steps: periods from n / 3 down to 2
    top = low + int(power[low : high + 1].argmax())
    peak = float(top)
    if low < top < high:
        a, b, c = np.log(power[top - 1 : top + 2] + 1e-300)
        peak += float(0.5 * (a - c) / (a - 2 * b + c)) if a - 2 * b + c else 0.0
    angle = 2 * np.pi * peak / (8 * n) * np.arange(n)
    basis = np.stack([np.cos(angle), np.sin(angle)])
    fitted = np.linalg.pinv(basis @ basis.T, hermitian=True) @ (basis @ rest) @ basis
    strength = 1 - float((rest - fitted) @ (rest - fitted)) / total
    return 8 * n / peak, max(strength, 0.0)


@lru_cache(maxsize=4)
def _trends(n: int) -> np.ndarray:
    """An orthonormal basis (n, 3) of the quadratic trends over n distances."""
    return np.linalg.qr(np.vander(np.linspace(-1, 1, n), 3))[0]


def channel_of(tokens: float | None, theta: list[float]) -> int | None:
    """The rotary channel whose turn takes nearest to so many tokens, None if there is none."""
    turning = [m for m, frequency in enumerate(theta) if frequency > 0]
    if tokens is None or not turning:
        return None
    return min(turning, key=lambda m: abs(math.log(period(theta[m]) / tokens)))


def _expected(statistics: LayerStatistics, h: int) -> Figures:
    """Persistence that the query model expects (see query_model), and periodicity."""
    sums = statistics.sums
    rows, seasonal = (
        max(float(sums["sampled_rows"]), 1.0),
        max(float(sums["seasonal_rows"][h]), 1.0),
    )
    vertical, diagonal, both, step, sink = (float(x) for x in sums["expected"][h])
    has_season = sums["seasonal_rows"][h] > 0
    expected_period, strength = lag_period(*expected_lag_profile(statistics, h))
    return {
        "expected_vertical": vertical / rows,
        "expected_diagonal": diagonal / rows,
        "expected_seasonal": both / seasonal if has_season else 0.0,
        "expected_seasonal_rows": step / seasonal if has_season else 0.0,
        "expected_sink_mass": sink / rows,
        "expected_period": expected_period,
        "expected_period_strength": strength,
    }


def expected_lag_profile(statistics: LayerStatistics, h: int) -> tuple[np.ndarray, np.ndarray]:
    """(logit, number of pairs) at every distance, if q and k always were their means.

    `sum_m Re(conj(q^m) k^m exp(-i lag theta_m))`, up to a constant and a factor: Theorem 5.3 with
    all channels, so that those which turn within the prompt show, whichever has the most energy.
    """
    sums = statistics.sums
    counts = sums["lag_counts"].astype(float)
    align = sums["align"][h] @ np.array([1, 1j])
    return (_turns(tuple(statistics.theta), len(counts)) @ align).real, counts


@lru_cache(maxsize=4)
def _turns(theta: tuple[float, ...], lags: int) -> np.ndarray:
    """`exp(-i lag theta_m)`, (lags, channels): the same for all heads of a layer."""
    return np.exp(-1j * np.arange(lags)[:, None] * np.array(theta))


def _bound_figures(sums: dict[str, np.ndarray], h: int) -> Figures:
    """Pairs checked, violations, and median tightness of every bound."""
    return {
        "bounds_checked": int(sums["checked"][h].sum()),
        "bound_violations": int(sums["violations"][h].sum()),
    } | {
        f"tightness_{name}": _finite(median_tightness(sums["tightness"][h, b]))
        for b, name in enumerate(BOUNDS)
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
