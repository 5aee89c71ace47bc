"""Deadlines, retries with a budget, a circuit breaker, and hedged attempts of a call."""

import contextlib
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import (
    ClientBusyError,
    DeadlineExceededError,
    ServerBusyError,
    ServerError,
)

Clock = Callable[[], float]  # returns seconds


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment by which a call must be over, on a monotonic clock.

    Passing a deadline instead of a timeout keeps each step within the time of the whole call.

    Attributes:
        at: a reading of `clock`, in seconds.
        clock: seconds, monotonic.
    """

    at: float
    clock: Clock = time.monotonic

    @classmethod
    def after_ms(cls, milliseconds: float, clock: Clock = time.monotonic) -> "Deadline":
        """Return the deadline `milliseconds` from now.

        Raises:
            InputError: not above 0, or not a finite number.
        """
        if not (milliseconds > 0 and math.isfinite(milliseconds)):
            raise InputError(f"a deadline of {milliseconds} ms: give milliseconds above 0")
        return cls(clock() + milliseconds / 1e3, clock)

    def left(self) -> float:
        """Return the seconds left, 0 once it has passed."""
        return max(0.0, self.at - self.clock())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.clock() >= self.at

    def earlier(self, seconds: float) -> "Deadline":
        """Return the deadline `seconds` before this one, to keep a reserve."""
        return Deadline(self.at - seconds, self.clock)


class RetryBudget:
    """A token bucket for extra attempts: each call adds `share`, each retry or hedge takes 1.

    Over any number of calls there are at most `share` times as many extra attempts, plus
    `capacity`. A full budget lasts for a short disturbance; in a long one, retries fall to the
    share.

    Source: Finagle's RetryBudget (finagle.github.io/blog/2016/02/08/retry-budgets) and gRPC's
    retry throttling (gRFC A6, proposal A6-client-retries.md); the idea of 10% is that of
    Beyer et al., Site Reliability Engineering (2016), chapter 21, "Handling Overload".

    Args:
        share: tokens per call, at least 0.
        capacity: capacity of the bucket, which starts full.

    Raises:
        InputError: one of them is below 0.
    """

    def __init__(self, share: float = 0.1, capacity: float = 5.0) -> None:
        if share < 0 or capacity < 0:
            raise InputError(
                f"a retry budget of {share:g} per call, at most {capacity:g}: both from 0"
            )
        self._share, self._capacity = share, capacity
        self._tokens = capacity
        self._lock = threading.Lock()

    def deposit(self) -> None:
        """Count a call."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._share)

    def withdraw(self) -> bool:
        """Take a token for one more attempt; False if there is none."""
        with self._lock:
            # Ten deposits of 0.1 sum to slightly less than 1 in binary.
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            return True


class RecentTimes:
    """Quantiles of the latest durations. Threads may share one.

    Args:
        keep: how many durations to remember, at least 1.
    """

    def __init__(self, keep: int = 64) -> None:
        if keep < 1:
            raise InputError(f"keep is {keep}: remember at least 1 duration")
        self._seconds: deque[float] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seconds)

    def add(self, seconds: float) -> None:
        """Add a duration in seconds."""
        with self._lock:
            self._seconds.append(seconds)

    def quantile(self, share: float) -> float | None:
        """Return the duration that `share` of the runs did not exceed; None before the first run.

        The nearest rank is taken: a duration that really occurred.
        """
        with self._lock:
            ordered = sorted(self._seconds)
        if not ordered:
            return None
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Number of attempts, and pauses between them.

    Attributes:
        attempts: largest number of attempts, including the first one.
        first_s: bound of the first pause; it doubles with each retry.
        longest_s: the largest bound.

    Raises:
        InputError: a value out of bounds.
    """

    attempts: int = 3
    first_s: float = 0.02
    longest_s: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 < self.first_s <= self.longest_s:
            raise InputError(f"a backoff cannot be {self}")

    def bound_s(self, retry: int) -> float:
        """Return the longest pause before a retry; the first retry is number 0."""
        return min(self.longest_s, self.first_s * 2.0 ** min(retry, 30))


def with_retries(
    attempt: Callable[[], T],
    *,
    deadline: Deadline,
    budget: RetryBudget,
    backoff: Backoff,
    sleep: Callable[[float], object] = time.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> T:
    """Call `attempt` until it succeeds, or a retry is of no use.

    Pauses have full jitter. A server's `Retry-After` is respected; if it is past the deadline,
    there is no retry.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015).

    Raises:
        ServerError: from the last attempt.
    """
    for retry in range(backoff.attempts):
        try:
            return attempt()
        except ServerError as error:
            wait = uniform(0, backoff.bound_s(retry))
            if isinstance(error, ServerBusyError) and error.retry_after is not None:
                wait += error.retry_after  # plus jitter: other clients were told the same
            is_last = retry + 1 == backoff.attempts
            if is_last or not error.retryable or wait >= deadline.left() or not budget.withdraw():
                raise
            sleep(wait)
    raise AssertionError("a loop over at least one attempt returns or raises")


State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """When a circuit breaker opens, and for how long.

    Attributes:
        failure_share: share of failures in the window at which it opens.
        window_calls: size of the window in calls.
        window_s: size of the window in seconds.
        fewest_calls: minimum number of calls in the window before it opens.
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
    """Circuit breaker: stop calling a server that fails.

    Closed, it admits all calls. Open, it admits none. Half-open, it admits one at a time, whose
    result decides; the results of earlier calls do not count then.

    Args:
        rules: see `BreakerRules`.
        half_opens: whether it becomes half-open by itself after the open time. If not, a probe
            of the server has to call `half_open` or `stay_open`.
        on_open: called whenever it opens, in the thread whose call failed.
        clock: seconds, monotonic.
        uniform: returns a random number between two bounds.
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
        self._era = 0  # permits of an earlier era do not count
        self._is_probing = False

    @property
    def state(self) -> State:
        """The state: closed, open or half-open."""
        return self._state

    @property
    def reason(self) -> str | None:
        """Why it opened, if waiting does not help; None otherwise."""
        return self._reason if self._lasting and self._state != "closed" else None

    def open_s(self) -> float:
        """Return the seconds until the open time is over; 0 if it is not open."""
        with self._lock:
            return max(0.0, self._open_until - self._clock()) if self._state == "open" else 0.0

    def admit(self) -> "Permit | None":
        """Return a permit for a call, which must be ended once; None to refuse the call."""
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
        """Return whether `admit` would return a permit now; changes nothing."""
        if self._state == "open":
            return self._half_opens and self._clock() >= self._open_until
        return not self._is_probing

    def half_open(self) -> None:
        """Admit one call: the server seems to be available again."""
        with self._lock:
            if self._state == "open":
                self._state = "half-open"

    def stay_open(self) -> None:
        """Start another, longer open time: the server is not available yet."""
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
        """Count the result of a call; return whether the breaker has to open."""
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
    """Permission to make one call; call one method with its result."""

    __slots__ = ("_breaker", "_era")

    def __init__(self, breaker: CircuitBreaker, era: int) -> None:
        self._breaker, self._era = breaker, era

    def succeeded(self) -> None:
        """Report a success."""
        self._breaker._end(self._era, True, "", False)

    def failed(self, reason: str = "", *, lasting: bool = False) -> None:
        """Report a failure of the server.

        Args:
            reason: why, in a few words.
            lasting: waiting a little does not help, so that the breaker opens at once.
        """
        self._breaker._end(self._era, False, reason, lasting)

    def unused(self) -> None:
        """Report that the call says nothing about the server, or was not made."""
        self._breaker._end(self._era, None, "", False)


@dataclass(frozen=True, slots=True, eq=False)
class Attempt(Generic[T]):
    """An attempt in progress.

    Attributes:
        future: its result.
        cancel: ends it early; does nothing once it is over.
    """

    future: "Future[T]"
    cancel: Callable[[], None]


def first_answer(
    start: Callable[[], Attempt[T]],
    *,
    deadline: Deadline,
    hedge_after: float | None = None,
    may_hedge: Callable[[], bool] = lambda: True,
) -> T:
    """Start an attempt, and a second one if it is slow; return the first result.

    Both are cancelled when this returns, whatever the reason.

    Args:
        start: starts an attempt and returns at once.
        deadline: when to give up.
        hedge_after: seconds after which a second attempt is started; None for never.
        may_hedge: called at that moment; whether the second attempt is allowed.

    Raises:
        DeadlineExceededError: no result in time.
        Exception: from the first attempt, if none succeeded.
    """
    attempts = [start()]
    try:
        if hedge_after is not None and hedge_after < deadline.left():
            _, pending = wait([attempts[0].future], timeout=hedge_after)
            if pending and may_hedge():
                with contextlib.suppress(ClientBusyError):
                    attempts.append(start())
        return _first([attempt.future for attempt in attempts], deadline)
    finally:
        for attempt in attempts:
            attempt.cancel()


def _first(futures: "list[Future[T]]", deadline: Deadline) -> T:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=deadline.left(), return_when=FIRST_COMPLETED)
        if not done:
            raise DeadlineExceededError("the server did not answer in time")
        for future in futures:
            if future in done and future.exception() is None:
                return future.result()
    # All have failed; the first error is raised.
    return futures[0].result()
