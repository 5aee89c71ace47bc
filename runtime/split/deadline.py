"""A moment by which a call has to be over, handed down to everything it does."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgeclip.runtime.errors import InputError

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Deadline:
    """An absolute moment on a clock that never jumps.

    Handing it down, rather than a timeout, leaves no step with more time than the whole has.

    Attributes:
        at: a reading of `clock`, in seconds.
        clock: seconds since some moment; it must not go backwards.
    """

    at: float
    clock: Clock = time.monotonic

    @classmethod
    def after_ms(cls, milliseconds: float, clock: Clock = time.monotonic) -> "Deadline":
        """The moment `milliseconds` from the present.

        Raises:
            InputError: not above 0, or not a finite number.
        """
        if not (milliseconds > 0 and math.isfinite(milliseconds)):
            raise InputError(f"a deadline of {milliseconds} ms: give milliseconds above 0")
        return cls(clock() + milliseconds / 1e3, clock)

    def left(self) -> float:
        """Seconds that are left, 0 once it has passed."""
        return max(0.0, self.at - self.clock())

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.clock() >= self.at

    def earlier(self, seconds: float) -> "Deadline":
        """The moment `seconds` before this one, to keep a reserve."""
        return Deadline(self.at - seconds, self.clock)
