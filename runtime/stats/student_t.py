"""Student's t distribution, and what rests on it: intervals of means of independent values."""

import math
from functools import lru_cache

import numpy as np

# Student's t distribution, with x = tan(angle) * sqrt(degrees): its density over the angle is
# proportional to cos(angle) ** (degrees - 1), which Gauss-Legendre quadrature integrates exactly
# enough. It spares the runtime a dependency on SciPy.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_MAX_STEPS, _TOLERANCE = 100, 1e-13  # of Newton's method, which takes about ten steps


def student_t_cdf(t: float, degrees: float) -> float:
    """Cumulative distribution function of Student's t; `degrees` of freedom at least 1."""
    return _cdf_of_angle(math.atan2(t, math.sqrt(degrees)), degrees)


@lru_cache(maxsize=1024)
def student_t_quantile(chance: float, degrees: float) -> float:
    """Quantile function of Student's t; `chance` in (0, 1), `degrees` of freedom at least 1."""
    if chance < 0.5:
        return -student_t_quantile(1 - chance, degrees)
    angle = 0.0
    for _ in range(_MAX_STEPS):  # the distribution function is concave here: no overshoot
        step = (chance - _cdf_of_angle(angle, degrees)) / _density_of_angle(angle, degrees)
        angle += step
        if abs(step) < _TOLERANCE:
            break
    return math.sqrt(degrees) * math.tan(angle)


def _cdf_of_angle(angle: float, degrees: float) -> float:
    heights = np.cos(angle * (_NODES + 1) / 2) ** (degrees - 1)
    return 0.5 + _density_of_angle(0.0, degrees) * angle / 2 * float(_WEIGHTS @ heights)


def _density_of_angle(angle: float, degrees: float) -> float:
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return float(scale / math.sqrt(math.pi) * math.cos(angle) ** (degrees - 1))
