"""Attempts here are futures that a test ends itself; the waiting is real."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.connection import DaemonThreads
from edgeclip.runtime.split.errors import ClientBusyError, DeadlineExceededError
from edgeclip.runtime.split.resilience import Attempt, Deadline, first_answer

AMPLE = 30_000.0


class Attempts:
    """Starts attempts, each of which does what its step says to its future."""

    def __init__(self, *steps: Callable[["Future[str]"], object]) -> None:
        self.steps = list(steps)
        self.cut: list[int] = []
        self.started = 0

    def __call__(self) -> Attempt[str]:
        number, future = self.started, Future[str]()
        self.started += 1
        self.steps[number](future)
        return Attempt(future, lambda: self.cut.append(number))


def never(future: "Future[str]") -> None:
    pass


def answers(text: str) -> Callable[["Future[str]"], object]:
    return lambda future: future.set_result(text)


def fails(future: "Future[str]") -> None:
    future.set_exception(ValueError("broken"))


def refuses_to_start(future: "Future[str]") -> None:
    raise ClientBusyError("no thread")


def run(attempts: Attempts, *, ms: float = AMPLE, hedge: float | None = 0.01) -> str:
    return first_answer(attempts, deadline=Deadline.after_ms(ms), hedge_after=hedge)


def test_fast_answer_needs_no_second_attempt() -> None:
    attempts = Attempts(answers("first"))
    assert run(attempts, hedge=30) == "first"
    assert attempts.cut == [0]


def test_second_attempt_wins_and_both_are_cut_off() -> None:
    attempts = Attempts(never, answers("second"))
    assert run(attempts) == "second"
    assert attempts.cut == [0, 1]


def test_first_attempt_may_still_win() -> None:
    first: list[Future[str]] = []
    attempts = Attempts(first.append, lambda _: first[0].set_result("first"))
    assert run(attempts) == "first"


def test_failure_waits_for_the_other_attempt() -> None:
    assert run(Attempts(never, lambda f: threading.Timer(0.05, f.set_result, ["second"]).start()))
    slow_first: list[Future[str]] = []

    def fail_then_answer_first(future: "Future[str]") -> None:
        future.set_exception(ValueError("second is broken"))
        threading.Timer(0.05, slow_first[0].set_result, ["first"]).start()

    assert run(Attempts(slow_first.append, fail_then_answer_first)) == "first"


def test_failure_before_the_hedge_is_told_at_once() -> None:
    attempts = Attempts(fails)
    with pytest.raises(ValueError, match="broken"):
        run(attempts, hedge=30)
    assert attempts.started == 1


def test_no_answer_in_time() -> None:
    attempts = Attempts(never, never)
    with pytest.raises(DeadlineExceededError):
        run(attempts, ms=50)
    assert attempts.cut == [0, 1]


def test_no_second_attempt_without_leave_thread_or_time() -> None:
    for hedge, budget in ((0.01, False), (None, True), (30.0, True)):
        attempts = Attempts(never)
        with pytest.raises(DeadlineExceededError):
            first_answer(
                attempts,
                deadline=Deadline.after_ms(50),
                hedge_after=hedge,
                may_hedge=lambda budget=budget: budget,  # type: ignore[misc]
            )
        assert attempts.started == 1
    with pytest.raises(DeadlineExceededError):
        run(Attempts(never, refuses_to_start), ms=50)


def test_workers_are_made_when_needed_and_bounded() -> None:
    workers = DaemonThreads(2, "test")
    go_on = threading.Event()
    hanging = [workers.submit(go_on.wait) for _ in range(2)]
    with pytest.raises(ClientBusyError, match="2 calls wait"):
        workers.submit(go_on.wait)
    assert workers.busy == 2
    go_on.set()
    assert [future.result(30) for future in hanging] == [True, True]
    assert workers.submit(lambda: "again").result(30) == "again"
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("test") <= 2
    workers.close()
    with pytest.raises(ClientBusyError, match="closed"):
        workers.submit(go_on.wait)


def test_workers_hand_errors_on() -> None:
    workers = DaemonThreads(1, "test")
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(30)
    assert workers.submit(lambda: "fine").result(30) == "fine"
    workers.close()


def test_no_workers_at_all() -> None:
    with pytest.raises(InputError):
        DaemonThreads(0, "test")
