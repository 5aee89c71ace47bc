import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import (
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
)
from edgeclip.runtime.split.resilience import Backoff, Deadline, RetryBudget, with_retries


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def attempts(*errors: ServerError) -> Callable[[], str]:
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def run(attempt: Callable[[], str], time: Time, *, seconds: float = 10, budget: float = 100) -> str:
    return with_retries(
        attempt,
        deadline=Deadline(seconds, time.clock),
        budget=RetryBudget(0, budget),
        backoff=Backoff(attempts=4, first_s=0.1, longest_s=0.3),
        sleep=time.sleep,
        uniform=lambda low, high: high,
    )


BROKEN = ServerUnreachableError("broken")


def test_pauses_grow_up_to_their_bound() -> None:
    time = Time()
    assert run(attempts(BROKEN, BROKEN, BROKEN), time) == "done"
    assert time.slept == pytest.approx([0.1, 0.2, 0.3])


def test_attempts_are_bounded() -> None:
    with pytest.raises(ServerUnreachableError):
        run(attempts(BROKEN, BROKEN, BROKEN, BROKEN), Time())


def test_what_cannot_do_better_is_told_at_once() -> None:
    time = Time()
    with pytest.raises(ServerRefusedError):
        run(attempts(ServerRefusedError("no", 400)), time)
    assert time.slept == []


def test_retry_after_is_obeyed_where_it_fits() -> None:
    time = Time()
    assert run(attempts(ServerBusyError("busy", 2.0)), time) == "done"
    assert time.slept == pytest.approx([2.1])
    with pytest.raises(ServerBusyError):
        run(attempts(ServerBusyError("busy", 20.0)), Time())


def test_without_budget_nothing_is_tried_again() -> None:
    with pytest.raises(ServerUnreachableError):
        run(attempts(BROKEN), Time(), budget=0.5)


@given(st.floats(0.001, 2), st.integers(0, 5))
def test_no_pause_ends_after_the_deadline(seconds: float, failures: int) -> None:
    time = Time()
    with contextlib.suppress(ServerError):
        run(attempts(*[BROKEN] * failures), time, seconds=seconds)
    assert time.now < seconds


def test_backoff_that_makes_no_sense() -> None:
    with pytest.raises(InputError):
        Backoff(attempts=0)
