"""Measured values with confidence intervals, and estimates that give bounds at any confidence."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

_EACH_END = 0.975  # confidence of each end of a 95% interval


@dataclass(frozen=True, slots=True)
class _OpenEnd:
    """Lets `runtime.device.schema.parse` read null, which JSON has for infinity, as `end`."""

    end: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import BeforeValidator

        read = BeforeValidator(lambda value: self.end if value is None else value)
        return read.__get_pydantic_core_schema__(source, handler)


LowEnd = Annotated[float, _OpenEnd(-math.inf)]
"""A lower end of an interval: minus infinity where nothing is known, null in JSON."""

HighEnd = Annotated[float, _OpenEnd(math.inf)]
"""An upper end of an interval: infinity where nothing is known, null in JSON."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its confidence interval, of 95% where nothing else is said.

    An end is infinite where the data set no bound on that side; in JSON it is null then.
    """

    value: float
    low: LowEnd
    high: HighEnd

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of the value times a factor above 0, such as 100 for points."""
        return Interval(factor * self.value, factor * self.low, factor * self.high)


class Estimate(ABC):
    """A value estimated from data, with confidence bounds.

    Attributes:
        value: the point estimate.
    """

    __slots__ = ()
    value: float

    @abstractmethod
    def lower_bound(self, confidence: float) -> float:
        """Return a bound above which the true value lies with this probability, in (0.5, 1)."""

    @abstractmethod
    def upper_bound(self, confidence: float) -> float:
        """Return a bound below which the true value lies with this probability, in (0.5, 1)."""

    @property
    def interval(self) -> Interval:
        """The value and its 95% interval, each end of which holds with 97.5%."""
        return self.interval_at(_EACH_END)

    def interval_at(self, confidence: float) -> Interval:
        """Return the value and its interval, each end of which holds with `confidence`."""
        low, high = self.lower_bound(confidence), self.upper_bound(confidence)
        return Interval(self.value, min(low, self.value), max(high, self.value))
