"""A circuit breaker: a server that fails is left alone for a while, and calls cost nothing.

Source: Nygard, Release It! (2nd edition, 2018), chapter 5. The open time grows exponentially
with full jitter: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015).
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.deadline import Clock

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """When a breaker opens, and for how long.

    Attributes:
        failure_share: of the calls in the window, from which it opens.
        window_calls: how many of the last calls count.
        window_s: for how many seconds a call counts.
        fewest_calls: how many must count before it may open.
        first_open_s: bound of the first open time; it doubles each time in a row.
        longest_open_s: the largest bound.

    Raises:
        InputError: a value out of bounds.
    """

    failure_share: float = 0.5
    window_calls: int = 10
    window_s: float = 30.0
    fewest_calls: int = 3
    first_open_s: float = 0.1
    longest_open_s: float = 1.0

    def __post_init__(self) -> None:
        fits = 0 < self.failure_share <= 1 and 1 <= self.fewest_calls <= self.window_calls
        if not fits or self.window_s <= 0 or not 0 < self.first_open_s <= self.longest_open_s:
            raise InputError(f"a breaker cannot have these rules: {self}")


class CircuitBreaker:
    """Admits calls while they tend to go well.

    Closed, it admits all. Open, it admits none. Half-open, it admits one at a time, whose end
    decides; what earlier calls report meanwhile does not count.

    Args:
        rules: see `BreakerRules`.
        half_opens: whether the end of the open time lets one call through. If not, somebody
            else has to look after the server, and tell by `half_open` or `stay_open`.
        on_open: called whenever it opens, in the thread whose call failed.
        clock: seconds, never backwards.
        uniform: a random number between two bounds.
    """

    def __init__(
        self,
        rules: BreakerRules | None = None,
        *,
        half_opens: bool = True,
        on_open: Callable[[], None] | None = None,
        clock: Clock = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._rules = rules or BreakerRules()
        self._half_opens, self._on_open = half_opens, on_open
        self._clock, self._uniform = clock, uniform
        self._lock = threading.Lock()
        self._ends: deque[tuple[float, bool]] = deque(maxlen=self._rules.window_calls)
        self._state: State = "closed"
        self._reason = ""
        self._lasting = False
        self._open_until = 0.0
        self._openings = 0  # in a row
        self._era = 0  # permits of an earlier one do not count
        self._is_probing = False

    @property
    def state(self) -> State:
        """Closed, open or half-open."""
        return self._state

    @property
    def reason(self) -> str | None:
        """Why it opened, if waiting does not mend that; None otherwise."""
        return self._reason if self._lasting and self._state != "closed" else None

    def open_s(self) -> float:
        """Seconds until the open time is over; 0 if it is not open."""
        with self._lock:
            return max(0.0, self._open_until - self._clock()) if self._state == "open" else 0.0

    def admit(self) -> "Permit | None":
        """Ask to make a call; None if it must not be made. Each permit is to be ended once."""
        with self._lock:
            if self._state == "closed":
                return Permit(self, self._era)
            over = self._half_opens and self._clock() >= self._open_until
            if self._state == "open" and not over:
                return None
            self._state = "half-open"
            if self._is_probing:
                return None
            self._is_probing = True
            return Permit(self, self._era)

    def would_admit(self) -> bool:
        """Whether `admit` would give a permit; costs nothing, promises nothing."""
        if self._state == "open":
            return self._half_opens and self._clock() >= self._open_until
        return not self._is_probing

    def half_open(self) -> None:
        """Let one call through: the server seems to be back."""
        with self._lock:
            if self._state == "open":
                self._state = "half-open"

    def stay_open(self) -> None:
        """Begin another, longer open time: the server is not back."""
        with self._lock:
            if self._state == "open":
                self._begin_open_time()

    def _end(self, era: int, succeeded: bool | None, reason: str, lasting: bool) -> None:
        with self._lock:
            if era != self._era:
                return
            if self._state == "half-open":
                self._is_probing = False
            if succeeded is None:
                return
            opened = self._count(succeeded, lasting)
            if opened:
                self._open(reason, lasting)
        if opened and self._on_open is not None:
            self._on_open()

    def _count(self, succeeded: bool, lasting: bool) -> bool:
        """Take note of the end of a call; whether the breaker has to open."""
        if self._state == "half-open":
            if succeeded:
                self._close()
            return not succeeded
        now = self._clock()
        self._ends.append((now, succeeded))
        while self._ends[0][0] < now - self._rules.window_s:
            self._ends.popleft()
        if succeeded:
            return False
        failures = sum(not ended_well for _, ended_well in self._ends)
        enough = len(self._ends) >= self._rules.fewest_calls
        return lasting or (enough and failures >= self._rules.failure_share * len(self._ends))

    def _open(self, reason: str, lasting: bool) -> None:
        self._state, self._reason, self._lasting = "open", reason, lasting
        self._is_probing = False
        self._era += 1
        self._begin_open_time()

    def _begin_open_time(self) -> None:
        rules = self._rules
        doubled = rules.first_open_s * 2 ** min(self._openings, 30)
        self._open_until = self._clock() + self._uniform(0, min(rules.longest_open_s, doubled))
        self._openings += 1

    def _close(self) -> None:
        self._state, self._openings = "closed", 0
        self._era += 1
        self._ends.clear()


class Permit:
    """The right to make one call; say how it ended."""

    __slots__ = ("_breaker", "_era")

    def __init__(self, breaker: CircuitBreaker, era: int) -> None:
        self._breaker, self._era = breaker, era

    def succeeded(self) -> None:
        """The server answered as it should."""
        self._breaker._end(self._era, True, "", False)

    def failed(self, reason: str = "", *, lasting: bool = False) -> None:
        """The server failed.

        Args:
            reason: in a few words.
            lasting: waiting a little does not mend it, so that the breaker opens at once.
        """
        self._breaker._end(self._era, False, reason, lasting)

    def unused(self) -> None:
        """The call says nothing about the server, or was not made."""
        self._breaker._end(self._era, None, "", False)
