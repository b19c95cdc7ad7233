"""The period of a curve over lags, to a fraction of a percent."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

Curve = Float[np.ndarray, " lags"]


def spacing(curve: Curve) -> float | None:
    """The period between 2 and a third of a curve's length that explains most of it, if any.

    The curve is freed of a quadratic trend; the largest peak of its spectrum is then refined: the
    period whose sinusoid, beside a trend fitted together with it, leaves least, weighted by
    how many pairs a lag has (`length - lag`). Lag 0 is left out: it is not like the others.
    """
    used = np.asarray(curve, float)[1:]
    n = len(used)
    if n < 8 or not np.isfinite(used).all():
        return None
    weight = np.sqrt(np.arange(n, 0, -1) / n)
    x = np.linspace(-1, 1, n)
    rest = used - np.polynomial.Polynomial.fit(x, used, 2, w=weight)(x)
    if np.abs(rest).max() <= 1e-9 * max(np.abs(used).max(), 1e-30):
        return None
    power = np.abs(np.fft.rfft(rest * np.hanning(n), n=8 * n))
    low, high = 24, 4 * n  # cycles in 8 n steps: periods from n / 3 down to 2
    top = low + int(power[low : high + 1].argmax())

    def left(cycles: float) -> float:
        angle = 2 * np.pi * cycles / (8 * n) * np.arange(n)
        basis = np.stack([np.ones(n), x, x**2, np.cos(angle), np.sin(angle)], 1) * weight[:, None]
        fitted = basis @ np.linalg.lstsq(basis, used * weight, rcond=None)[0]
        return float(((used * weight - fitted) ** 2).sum())

    bounds = (max(top - 4, low - 4), min(top + 4, high))
    best = minimize_scalar(left, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(8 * n / best.x)
