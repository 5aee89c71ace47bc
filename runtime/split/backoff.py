"""Attempts one after the other, within one deadline and one budget."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.errors import ServerBusyError, ServerError
from edgeclip.runtime.split.retry_budget import RetryBudget

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How often to try, and how long to pause between.

    Attributes:
        attempts: at most, the first one included.
        first_s: bound of the first pause; it doubles with each.
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
        """The longest pause before the retry of that number, from 0."""
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
    """Call `attempt` until it succeeds, or trying again is of no use.

    Pauses have full jitter. A server that says when it wants to be asked again is obeyed; if
    that is past the deadline, it is not asked again.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015).

    Raises:
        ServerError: what the last attempt raised.
    """
    for retry in range(backoff.attempts):
        try:
            return attempt()
        except ServerError as error:
            wait = uniform(0, backoff.bound_s(retry))
            if isinstance(error, ServerBusyError) and error.retry_after is not None:
                wait += error.retry_after  # jitter on top: others were told the same
            is_last = retry + 1 == backoff.attempts
            if is_last or not error.retryable or wait >= deadline.left() or not budget.withdraw():
                raise
            sleep(wait)
    raise AssertionError("a loop over at least one attempt returns or raises")
