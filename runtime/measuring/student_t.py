"""Student's t: the distribution of a mean's error, counted in a spread that few values gave.

With t = sqrt(degrees) tan(angle) its density is a power of the cosine, which Gauss-Legendre
quadrature integrates to ten digits (Abramowitz and Stegun, 26.7). Degrees need not be whole.
"""

import math
from functools import lru_cache

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_MOST_STEPS, _EXACT = 100, 1e-13  # of Newton's method; some ten are needed


def chance_below(t: float, degrees: float) -> float:
    """The chance that a value of Student's distribution lies below `t`; `degrees` at least 1."""
    return _chance_below(math.atan2(t, math.sqrt(degrees)), degrees)


@lru_cache(maxsize=1024)
def quantile(chance: float, degrees: float) -> float:
    """The value below which `chance`, in (0, 1), of the distribution lies; `degrees` >= 1."""
    if chance < 0.5:
        return -quantile(1 - chance, degrees)
    angle = 0.0
    for _ in range(_MOST_STEPS):  # the chance is concave here: no step goes too far
        step = (chance - _chance_below(angle, degrees)) / _density(angle, degrees)
        angle += step
        if abs(step) < _EXACT:
            break
    return math.sqrt(degrees) * math.tan(angle)


def _chance_below(angle: float, degrees: float) -> float:
    heights = np.cos(angle * (_NODES + 1) / 2) ** (degrees - 1)
    return 0.5 + _density(0.0, degrees) * angle / 2 * float(_WEIGHTS @ heights)


def _density(angle: float, degrees: float) -> float:
    """Of the angle."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    return float(scale / math.sqrt(math.pi) * math.cos(angle) ** (degrees - 1))
