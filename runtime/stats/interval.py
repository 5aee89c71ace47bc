"""A measured value with the ends of its confidence interval."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its confidence interval, of 95% where nothing else is said.

    An end is infinite where the data set no bound on that side.
    """

    value: float
    low: float
    high: float
