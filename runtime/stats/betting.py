"""Bet against the hypothesis that a mean is at most 0: tests that hold at every count.

Under that hypothesis no bet on the values pays: with a stake s below 1 / -low, prod(1 + s x) over
values x in [low, high] is a nonnegative supermartingale that begins at 1, and so is the mean over
several stakes. By Ville's inequality (1939) it ever reaches 1 / p with probability p at most. So
one may look after each value, and go on betting where more are found. (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS-B 86, 2024, section 4; a grid of
stakes in place of one that is guessed.) The values come in an order that does not depend on them.
"""

import math
from collections.abc import Sequence

import numpy as np

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError

STAKES = 30


def stake_grid(low: float) -> Values:
    """Return the stakes, ascending and evenly spaced between 0 and 1 / -low: float64 [STAKES].

    Raises:
        InputError: `low` is not below 0, so that nothing can be lost and no bet is fair.
    """
    if not low < 0:
        raise InputError(f"a bet needs values that may be negative, not at least {low:g}")
    stakes: Values = np.arange(1, STAKES + 1) / (STAKES + 1) / -low
    return stakes


def betting_p_value(values: Values, low: float) -> float:
    """Return the p-value of "the mean is at most 0", valid at every count by the running maximum.

    Args:
        values: independent values of `low` at least, float64 [N], in an order that does not depend
            on them. One value may be the sum over a cluster of dependent ones.
        low: the least possible value, below 0.

    Raises:
        InputError: `low` is not below 0, or a value is below it.
    """
    stakes = stake_grid(low)
    if not len(values):
        return 1.0
    if values.min() < low - 1e-9:
        raise InputError(f"a value of {values.min():g} is below the least possible one, {low:g}")
    distinct, which = np.unique(values, return_inverse=True)
    gains = np.log1p(np.outer(distinct, stakes))  # few values differ: answers are right or wrong
    wealth = np.cumsum(gains[which], axis=0)
    largest = wealth.max(axis=1)
    mean = largest + np.log(np.exp(wealth - largest[:, None]).mean(axis=1))
    return math.exp(-max(0.0, float(mean.max())))


class RestartedBets:
    """Bets against "the mean of what comes is at most 0" that a late change loses little to.

    Several hypotheses are bet on side by side, each with values of its own.

    All bets of `betting_p_value` lose while the hypothesis holds, and a change that comes late
    would have to win that back first. So a part of the capital, w(n) = u(n - 1) - u(n), is kept to
    be staked at the n-th value: per stake, A <- (A + w(n)) (1 + s x). What is not staked yet,
    u(n) = 1 / (1 + log(1 + n)), counts as well, so that the sum begins at 1 and is a
    supermartingale where each value's mean, given those before it, is at most 0: a mixture over the
    times of change. (E-detectors: Shin, Ramdas and Rinaldo, NEJSDS 2, 2023. u falls so slowly that
    a change after 100,000 values still has 6e-8 of the capital; of 1 / (n + 1) it has 1e-10.)

    Args:
        lows: the least possible value of each hypothesis, [B]. Where it is 0 or more nothing is
            staked.
        capital: of each stake on each, to continue from: floats [B, STAKES].
        count: number of values before.

    Raises:
        InputError: capital that is not one number of 0 or more for each stake.
    """

    def __init__(
        self, lows: Sequence[float], capital: Sequence[Sequence[float]] = (), count: int = 0
    ) -> None:
        none = np.zeros(STAKES)
        self._stakes = np.array([stake_grid(low) if low < 0 else none for low in lows])
        self._stakes = self._stakes.reshape(len(lows), STAKES)
        if any(len(row) != STAKES for row in capital) or len(capital) not in (0, len(lows)):
            raise InputError(f"the capital of bets must be {len(lows)} rows of {STAKES} numbers")
        given = np.array(capital, dtype=np.float64) if capital else np.zeros(self._stakes.shape)
        if not (given >= 0).all():
            raise InputError("the capital of bets must be numbers of 0 or more")
        self._capital, self.count = given.reshape(self._stakes.shape), count

    @property
    def capital(self) -> tuple[tuple[float, ...], ...]:
        """The capital of each stake, to continue from."""
        return tuple(tuple(map(float, row)) for row in self._capital)

    @property
    def wealth(self) -> Values:
        """The evidence against each hypothesis: all capital, float64 [B].

        That of one, or a mean that is chosen beforehand, ever reaches 1 / p with probability p at
        most.
        """
        found: Values = self._capital.mean(axis=1) + _unstaked(self.count)
        return found

    def bet(self, values: Values) -> None:
        """Take the next value of each, [B]."""
        staked = self._capital + (_unstaked(self.count) - _unstaked(self.count + 1))
        self.count += 1
        self._capital = staked * (1 + self._stakes * values[:, None])


def _unstaked(count: int) -> float:
    return 1 / (1 + math.log1p(count))
