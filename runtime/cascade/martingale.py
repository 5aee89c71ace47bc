"""A bet against "these p-values are independent and uniform": capital that grows if they are not.

The simple jumper (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman 2021, "Retrain or
not retrain") with several bettors and several jump rates: some bet on low or high p-values, two
on p-values near the ends or in the middle, one does not bet. At each step a part J of the
capital is spread evenly over the bettors, so that money follows whatever bet pays at the time;
the mean over several J needs no guess of how fast things change. Every bettor's function has
the mean 1 over [0, 1], so the capital is a nonnegative martingale that begins at 1: it ever
reaches c with probability at most 1/c (Ville 1939).
"""

import math
from dataclasses import dataclass

import numpy as np

_LINEAR = np.array([0.0, -0.95, -0.5, 0.5, 0.95, 0.0, 0.0])  # times 2p - 1
_CURVED = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -0.95, 1.9])  # times 6p^2 - 6p + 1
_BETTORS = len(_LINEAR)
_JUMPS = np.array([1e-4, 1e-3, 1e-2, 1e-1])[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capital:
    """How a bet stands, as plain numbers; `JumperMartingale.state` and its argument.

    Attributes:
        shares: for each jump rate, the share of its capital that each bettor holds.
        logs: for each jump rate, the natural logarithm of its capital.

    Raises:
        ValueError: another number of jump rates or bettors, or shares that are not shares.
    """

    shares: tuple[tuple[float, ...], ...] = ((1 / _BETTORS,) * _BETTORS,) * len(_JUMPS)
    logs: tuple[float, ...] = (0.0,) * len(_JUMPS)

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.shares]
        if rows != [_BETTORS] * len(_JUMPS) or len(self.logs) != len(_JUMPS):
            raise ValueError("the capital was kept by another version: start a new watch")
        sound = all(min(row) >= 0 and abs(sum(row) - 1) < 1e-6 for row in self.shares)
        if not sound or not all(map(math.isfinite, self.logs)):
            raise ValueError("the capital's shares must be shares, and its logarithms finite")


class JumperMartingale:
    """The capital of the bet, step by step.

    Args:
        capital: where to go on from; by default the beginning.
    """

    def __init__(self, capital: Capital | None = None) -> None:
        start = capital or Capital()
        self._shares = np.array(start.shares)
        self._logs = np.array(start.logs)

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the capital, which is 0 at the beginning."""
        return float(np.logaddexp.reduce(self._logs)) - math.log(len(_JUMPS))

    @property
    def state(self) -> Capital:
        """All there is to know to go on later."""
        shares = tuple(tuple(map(float, row)) for row in self._shares)
        return Capital(shares=shares, logs=tuple(map(float, self._logs)))

    def bet(self, p_value: float) -> float:
        """Take the next p-value, in [0, 1]; return the logarithm of what the capital grew by."""
        before = self.log_capital
        moved = (1 - _JUMPS) * self._shares + _JUMPS / _BETTORS
        moved *= _pays(p_value)
        total = moved.sum(axis=1)
        self._shares = moved / total[:, None]
        self._logs = self._logs + np.log(total)
        return self.log_capital - before


def _pays(p_value: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """What one unit becomes with each bettor; at least 0.05, so that no capital is ever 0."""
    curve = 6 * p_value * p_value - 6 * p_value + 1
    return 1 + _LINEAR * (2 * p_value - 1) + _CURVED * curve
