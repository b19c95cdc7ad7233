"""Is a difference noise? Paired differences, bootstrap intervals, permutation tests, Holm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, permutation_test

from tappa.errors import EvaluationError

RESAMPLES = 9_999
FloatArray = NDArray[np.float64]
Values = Sequence[float | int] | np.ndarray


@dataclass(frozen=True)
class Mean:
    """Mean of n samples and its standard error, `s / sqrt(n)` with the sample deviation s."""

    n: int
    mean: float
    error: float


@dataclass(frozen=True)
class Difference:
    """Mean paired difference, its bootstrap 95% interval, and the permutation test's p-value."""

    n: int
    mean: float
    low: float
    high: float
    p: float


def mean_of(values: Values) -> Mean:
    """Mean and standard error; the error of a single sample is NaN. Raises EvaluationError."""
    x = _checked(values)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Mean(len(x), float(x.mean()), error)


def paired_difference(values: Values, baseline: Values, seed: int = 0) -> Difference:
    """`mean(values - baseline)` of the same samples in the same order.

    The interval is the percentile bootstrap over samples. The p-value is that of the two-sided
    permutation test that flips the sign of each difference: exact for few samples, otherwise from
    9,999 random flips, so never below 1e-4. Raises EvaluationError where sizes differ.

    >>> paired_difference([3, 5, 4, 6], [1, 2, 3, 4]).p  # 2 of 16 flips are as far from 0
    0.125
    """
    x, y = _checked(values), _checked(baseline)
    if len(x) != len(y):
        raise EvaluationError(f"expected pairs of samples, got {len(x)} and {len(y)}")
    return _of_differences([x - y], seed)


def stratified_difference(
    values: Sequence[Values], baselines: Sequence[Values], seed: int = 0
) -> Difference:
    """The same for an average over tasks: the mean of the tasks' mean differences.

    Every task counts alike, however many samples it has; resampling is within tasks.
    """
    pairs = zip(values, baselines, strict=True)
    return _of_differences([_checked(x) - _checked(y) for x, y in pairs], seed)


def average_of(values: Sequence[Values]) -> Mean:
    """Mean of the tasks' means, with the error of that mean; n is the number of samples."""
    means = [mean_of(task) for task in values]
    error = math.sqrt(sum(m.error**2 for m in means)) / len(means)
    return Mean(sum(m.n for m in means), sum(m.mean for m in means) / len(means), error)


def holm(p_values: Values) -> list[float]:
    """p-values corrected for as many tests: `max over smaller ones of (m - rank) p`, at most 1.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, (len(p_values) - rank) * p_values[i])
        out[i] = min(highest, 1.0)
    return out


def _of_differences(tasks: list[FloatArray], seed: int) -> Difference:
    n, mean = sum(map(len, tasks)), float(np.mean([d.mean() for d in tasks]))
    if all(not d.any() for d in tasks):
        return Difference(n, 0.0, 0.0, 0.0, 1.0)
    if len(tasks) == 1:
        low, high, p = _one_task(tasks[0], seed)
    else:
        low, high, p = _many_tasks(tasks, mean, seed)
    return Difference(n, mean, low, high, p)


def _one_task(d: FloatArray, seed: int) -> tuple[float, float, float]:
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "vectorized": True, "rng": seed}
    if len(d) == 1:  # both signs are as far from 0
        return math.nan, math.nan, 1.0
    flips = permutation_test((d,), np.mean, permutation_type="samples", **options)
    interval = bootstrap((d,), np.mean, method="percentile", **options).confidence_interval
    return float(interval.low), float(interval.high), float(flips.pvalue)


def _many_tasks(tasks: list[FloatArray], mean: float, seed: int) -> tuple[float, float, float]:
    """Resampling within tasks, which scipy has not."""
    rng = np.random.default_rng(seed)
    resampled, flipped = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for d in tasks:
        resampled += d[rng.integers(len(d), size=(RESAMPLES, len(d)))].mean(1) / len(tasks)
        signs = rng.choice([-1.0, 1.0], size=(RESAMPLES, len(d)))
        flipped += (signs * d).mean(1) / len(tasks)
    low, high = np.percentile(resampled, [2.5, 97.5])
    further = int((np.abs(flipped) >= abs(mean) * (1 - 1e-12)).sum())
    return float(low), float(high), (further + 1) / (RESAMPLES + 1)


def _checked(values: Values) -> FloatArray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0:
        raise EvaluationError(f"expected at least one sample, got values of shape {x.shape}")
    if not np.isfinite(x).all():
        raise EvaluationError(f"expected finite scores, {int((~np.isfinite(x)).sum())} are not")
    return x
