"""The boldest threshold whose quality can be certified, by fixed-sequence testing.

Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei 2021): each threshold has the
null hypothesis "the cascade's quality is below `bound` times the teacher's". They are tested
in an order that was fixed beforehand, each at the full level delta, until one is not
rejected (Bauer 1991). The chance that any rejected one was true is at most delta: that needs
the first true null to be rejected, whatever comes after it.

For this the queries must be independent draws of one population, and neither the order of
the thresholds nor the thresholds themselves may depend on them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.cascade.trial import Trial

Values = NDArray[np.float64]
PValue = Callable[[Values, float, float], float]  # of values in [low, high]

_STAKES = 30
_ORDER_SEED = 0


def hoeffding_bentkus(values: Values, low: float, high: float) -> float:
    """P-value of "the mean of `values` [N] in [low, high] is at most 0".

    The smaller of Hoeffding's (1963) bound in its relative-entropy form and e times a
    binomial tail (Bentkus 2004), as Bates et al. (2021) join them. It sees the mean alone, so
    it is wide where most values are close to their mean.
    """
    count = len(values)
    losses = (high - values) / (high - low)
    mean, null = float(losses.mean()), high / (high - low)
    if mean >= null:
        return 1.0
    hoeffding = math.exp(-count * _relative_entropy(mean, null))
    bentkus = math.e * _binomial_tail(math.ceil(count * mean), count, null)
    return min(1.0, hoeffding, bentkus)


def betting(values: Values, low: float, high: float) -> float:
    """P-value of "the mean of `values` [N] in [low, high] is at most 0", low < 0 < high.

    Under that hypothesis no bet on the values pays: the mean over stakes s of
    prod(1 + s x value), with 0 < s < -1 / low, is a nonnegative supermartingale that begins at
    1, so by Ville's inequality it ever reaches 1/p with probability at most p (Waudby-Smith and
    Ramdas 2024, section 4; a grid of stakes instead of one that is guessed). It profits from
    values that vary little. The values come in an order that does not depend on them.

    Raises:
        ValueError: `low` is not below 0.
    """
    if low >= 0:
        raise ValueError(f"a bet needs values that may be negative, not low = {low}")
    stakes = np.arange(1, _STAKES + 1) / (_STAKES + 1) / -low
    distinct, which = np.unique(values, return_inverse=True)
    gains = np.log1p(np.outer(distinct, stakes))  # few values differ: answers are right or wrong
    wealth = np.cumsum(gains[which], axis=0)
    largest = wealth.max(axis=1)
    mean = largest + np.log(np.exp(wealth - largest[:, None]).mean(axis=1))
    return math.exp(-max(0.0, float(mean.max())))


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many hypotheses are rejected: those before the first whose p-value is above `delta`.

    P-values behind that one are not asked for.
    """
    rejected = 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected


def share_error(count: int, delta: float) -> float:
    """How far shares below any threshold, seen in `count` draws, may be off the true ones.

    With probability 1 - delta, for all thresholds at once (Dvoretzky, Kiefer and Wolfowitz 1956
    with Massart's constant 1990), so it holds for one that the same draws chose.
    """
    return math.sqrt(math.log(2 / delta) / (2 * count))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The boldest certified threshold, its p-value, and how many were certified in all."""

    threshold: float
    p_value: float
    certified: int


def choose_threshold(
    trial: Trial,
    grid: Sequence[float],
    *,
    bound: float,
    delta: float,
    p_value: PValue = betting,
) -> Chosen | None:
    """Choose the lowest threshold that is certified; None if not even the first one is.

    Args:
        trial: answers to independent queries that `grid` was not made from.
        grid: thresholds from the most cautious to the boldest, see `threshold_grid`.
        bound: the share of the teacher's quality to certify, in (0, 1].
        delta: the chance of a wrong certificate that is accepted, in (0, 1).
        p_value: of "the mean of these values in [low, high] is at most 0".
    """
    order = np.random.default_rng(_ORDER_SEED).permutation(len(trial))
    found: list[float] = []

    def tested() -> Iterable[float]:
        for threshold in grid:
            found.append(p_value(trial.surplus(threshold, bound)[order], -bound, 1.0))
            yield found[-1]

    certified = fixed_sequence(tested(), delta)
    if certified == 0:
        return None
    return Chosen(grid[certified - 1], found[certified - 1], certified)


def _relative_entropy(seen: float, null: float) -> float:
    """Kullback-Leibler divergence of two coins, with 0 <= seen < null < 1."""
    rest = (1 - seen) * math.log((1 - seen) / (1 - null))
    return rest if seen == 0 else seen * math.log(seen / null) + rest


def _binomial_tail(most: int, count: int, share: float) -> float:
    """P(Binomial(count, share) <= most)."""
    number = np.arange(most + 1)
    logs = np.array([math.lgamma(n + 1) + math.lgamma(count - n + 1) for n in number])
    logs = math.lgamma(count + 1) - logs
    logs += number * math.log(share) + (count - number) * math.log1p(-share)
    return float(np.exp(np.logaddexp.reduce(logs)))
