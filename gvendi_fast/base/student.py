"""Student's t distribution with any number of degrees of freedom: what it leaves outside +-t, and its quantile."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

# From here on the normal distribution is the same to 1e-5.
_NORMAL = 1e5
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def outside(t: float, freedom: float) -> float:
    """P(|T| > |t|), freedom > 0 or inf.

    t = sqrt(freedom) tan(x) turns the density into one that is proportional to cos(x)^(freedom - 1).
    """
    if t == 0:
        return 1.0
    if freedom >= _NORMAL:
        return math.erfc(abs(t) / math.sqrt(2))
    width = math.atan(1 / math.sqrt(freedom))
    low = math.atan(abs(t) / math.sqrt(freedom))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    total = 0.0
    # In pieces of the distribution's own width, as it is narrow for many degrees of freedom.
    while low < math.pi / 2 and width > 0:
        high = min(low + 4 * width, math.pi / 2)
        x = (high + low) / 2 + (high - low) / 2 * _POINTS
        part = (high - low) / 2 * float(_WEIGHTS @ np.cos(x).clip(1e-300) ** (freedom - 1))
        total += part
        low = high
        if part <= 1e-17 * total:
            break
    return min(1.0, 2 * math.exp(log_scale) * total)


def quantile(level: float, freedom: float) -> float:
    """The t >= 0 with P(|T| <= t) = level, 0 < level < 1."""
    if freedom >= _NORMAL:
        return NormalDist().inv_cdf(0.5 + level / 2)
    low, high = 0.0, 1.0
    while outside(high, freedom) > 1 - level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2
