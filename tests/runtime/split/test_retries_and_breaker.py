"""Deadlines, retry budgets, backoff, circuit breakers, hedges and durations."""

import contextlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.connection import DaemonThreads
from edgeclip.runtime.split.errors import (
    ClientBusyError,
    DeadlineExceededError,
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
)
from edgeclip.runtime.split.remote_with_fallback import DeviceTimes
from edgeclip.runtime.split.retries_and_breaker import (
    Attempt,
    Backoff,
    BreakerRules,
    CircuitBreaker,
    Deadline,
    Permit,
    RecentTimes,
    RetryBudget,
    first_answer,
    with_retries,
)
from tests.runtime.conftest import Clock


def test_time_runs_out_and_never_below_zero() -> None:
    now = [100.0]
    deadline = Deadline.after_ms(500, lambda: now[0])
    reserve = deadline.earlier(0.2)
    assert deadline.left() == pytest.approx(0.5)
    assert reserve.left() == pytest.approx(0.3)
    now[0] += 0.4
    assert (deadline.passed, reserve.passed) == (False, True)
    assert reserve.left() == 0
    now[0] += 10
    assert deadline.passed
    assert deadline.left() == 0


@pytest.mark.parametrize("milliseconds", [0, -1, math.nan, math.inf])
def test_deadline_must_lie_ahead(milliseconds: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        Deadline.after_ms(milliseconds)


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 1), st.floats(0, 20))
def test_extra_attempts_never_exceed_the_share_and_what_was_saved(
    calls: list[bool], share: float, most: float
) -> None:
    budget = RetryBudget(share, most)
    extra = 0
    for fails in calls:
        budget.deposit()
        extra += fails and budget.withdraw()
    assert extra <= share * len(calls) + most + 1e-6


def test_long_outage_leaves_one_retry_in_ten_calls() -> None:
    budget = RetryBudget(0.1, 5)
    allowed = []
    for _ in range(200):
        budget.deposit()
        allowed.append(budget.withdraw())
    assert all(allowed[:5])
    assert sum(allowed[100:]) == 10


def test_nothing_below_zero() -> None:
    with pytest.raises(InputError):
        RetryBudget(-0.1)


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


RULES = BreakerRules(
    fewest_calls=4, window_calls=8, window_s=10, first_open_s=0.1, longest_open_s=1
)


def longest(low: float, high: float) -> float:
    """In place of a random number: the upper bound."""
    return high


def make(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(RULES, clock=clock, uniform=longest)


def state(breaker: CircuitBreaker) -> str:
    return breaker.state


def permit(breaker: CircuitBreaker) -> Permit:
    found = breaker.admit()
    assert found is not None
    return found


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        permit(breaker).failed("no")


def test_opens_at_the_share_once_enough_calls_were_made(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    assert state(breaker) == "closed"
    permit(breaker).succeeded()
    assert state(breaker) == "closed"  # a success never opens it
    fail(breaker, 1)
    assert state(breaker) == "open"
    assert breaker.admit() is None
    assert not breaker.would_admit()


def test_mostly_good_calls_keep_it_closed(clock: Clock) -> None:
    breaker = make(clock)
    for _ in range(50):
        permit(breaker).succeeded()
        permit(breaker).succeeded()
        fail(breaker, 1)
    assert state(breaker) == "closed"


def test_old_failures_do_not_count(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    clock.now += 11
    fail(breaker, 3)
    assert state(breaker) == "closed"


def test_one_probe_at_a_time_decides(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 4)
    assert breaker.open_s() == pytest.approx(0.1)
    clock.now += 0.1
    assert breaker.would_admit()
    probe = permit(breaker)
    assert state(breaker) == "half-open"
    assert breaker.admit() is None
    assert not breaker.would_admit()
    probe.failed("again")
    assert breaker.open_s() == pytest.approx(0.2)
    clock.now += 0.2
    permit(breaker).succeeded()
    assert state(breaker) == "closed"
    fail(breaker, 4)
    assert breaker.open_s() == pytest.approx(0.1)


def test_probe_that_says_nothing_makes_way_for_another(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 4)
    clock.now += 1
    permit(breaker).unused()
    permit(breaker).succeeded()
    assert state(breaker) == "closed"


def test_open_time_is_bounded(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 4)
    for _ in range(50):
        assert breaker.open_s() <= 1
        clock.now += 1
        permit(breaker).failed()
    assert breaker.open_s() == 1


def test_late_ends_of_earlier_calls_do_not_count(clock: Clock) -> None:
    breaker = make(clock)
    late = [permit(breaker) for _ in range(3)]
    fail(breaker, 4)
    late[0].succeeded()
    assert state(breaker) == "open"
    clock.now += 1
    probe = permit(breaker)
    late[1].failed()
    assert state(breaker) == "half-open"
    probe.succeeded()
    late[2].failed()
    fail(breaker, 3)
    assert state(breaker) == "closed"


def test_lasting_failure_opens_at_once_and_is_remembered(clock: Clock) -> None:
    breaker = make(clock)
    permit(breaker).failed("wrong space", lasting=True)
    assert (state(breaker), breaker.reason) == ("open", "wrong space")
    clock.now += 1
    permit(breaker).succeeded()
    assert breaker.reason is None


def test_somebody_else_decides_when_it_half_opens(clock: Clock) -> None:
    opened = threading.Event()
    breaker = CircuitBreaker(
        RULES, half_opens=False, on_open=opened.set, clock=clock, uniform=longest
    )
    breaker.half_open()
    assert state(breaker) == "closed"
    fail(breaker, 4)
    assert opened.is_set()
    clock.now += 100
    assert breaker.admit() is None
    breaker.stay_open()
    assert breaker.open_s() == pytest.approx(0.2)
    breaker.half_open()
    permit(breaker).succeeded()
    assert state(breaker) == "closed"
    assert breaker.open_s() == 0


@pytest.mark.parametrize(
    "wrong",
    [{"failure_share": 0}, {"fewest_calls": 0}, {"fewest_calls": 11}, {"first_open_s": 2.0}],
)
def test_rules_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        BreakerRules(**wrong)  # type: ignore[arg-type]


class AnyHistory(RuleBasedStateMachine):
    """Calls that begin, end and overlap in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = make(self.clock)
        self.under_way: list[tuple[Permit, str]] = []

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def call_begins(self) -> None:
        could = self.breaker.would_admit()
        found = self.breaker.admit()
        assert (found is not None) is could
        if found is not None:
            self.under_way.append((found, self.breaker.state))

    @precondition(lambda self: bool(self.under_way))
    @rule(which=st.integers(0, 100), end=st.sampled_from(["succeeded", "failed", "unused"]))
    def call_ends(self, which: int, end: str) -> None:
        found, began = self.under_way.pop(which % len(self.under_way))
        was = self.breaker.state
        getattr(found, end)()
        if was == "half-open" and began == "half-open" and end == "succeeded":
            assert self.breaker.state in ("closed", "half-open")
        if was == "open":
            assert self.breaker.state == "open"

    @invariant()
    def is_never_open_for_long(self) -> None:
        assert self.breaker.open_s() <= RULES.longest_open_s
        if self.breaker.state == "half-open":
            probes = [1 for _, began in self.under_way if began == "half-open"]
            assert self.breaker.would_admit() or probes


TestAnyHistory = AnyHistory.TestCase

# Attempts here are futures that a test ends itself; the waiting is real.

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


def first_of(attempts: Attempts, *, ms: float = AMPLE, hedge: float | None = 0.01) -> str:
    return first_answer(attempts, deadline=Deadline.after_ms(ms), hedge_after=hedge)


def test_fast_answer_needs_no_second_attempt() -> None:
    attempts = Attempts(answers("first"))
    assert first_of(attempts, hedge=30) == "first"
    assert attempts.cut == [0]


def test_second_attempt_wins_and_both_are_cut_off() -> None:
    attempts = Attempts(never, answers("second"))
    assert first_of(attempts) == "second"
    assert attempts.cut == [0, 1]


def test_first_attempt_may_still_win() -> None:
    first: list[Future[str]] = []
    attempts = Attempts(first.append, lambda _: first[0].set_result("first"))
    assert first_of(attempts) == "first"


def test_failure_waits_for_the_other_attempt() -> None:
    assert first_of(
        Attempts(never, lambda f: threading.Timer(0.05, f.set_result, ["second"]).start())
    )
    slow_first: list[Future[str]] = []

    def fail_then_answer_first(future: "Future[str]") -> None:
        future.set_exception(ValueError("second is broken"))
        threading.Timer(0.05, slow_first[0].set_result, ["first"]).start()

    assert first_of(Attempts(slow_first.append, fail_then_answer_first)) == "first"


def test_failure_before_the_hedge_is_told_at_once() -> None:
    attempts = Attempts(fails)
    with pytest.raises(ValueError, match="broken"):
        first_of(attempts, hedge=30)
    assert attempts.started == 1


def test_no_answer_in_time() -> None:
    attempts = Attempts(never, never)
    with pytest.raises(DeadlineExceededError):
        first_of(attempts, ms=50)
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
        first_of(Attempts(never, refuses_to_start), ms=50)


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


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_a_duration_that_so_many_did_not_exceed(
    durations: list[float], share: float
) -> None:
    times = RecentTimes(keep=50)
    for seconds in durations:
        times.add(seconds)
    found = times.quantile(share)
    assert found in durations
    assert sum(seconds <= found for seconds in durations) >= share * len(durations)


def test_only_the_last_ones_count() -> None:
    times = RecentTimes(keep=3)
    assert times.quantile(0.5) is None
    for seconds in (100.0, 1.0, 2.0, 3.0):
        times.add(seconds)
    assert len(times) == 3
    assert times.quantile(1.0) == 3.0
    with pytest.raises(InputError):
        RecentTimes(keep=0)


def test_reserve_grows_with_work_and_count() -> None:
    time = DeviceTimes()
    nothing = time.reserve_s("pixels")
    with time.measured("pixels", 2):
        pass
    with time.measured("labels", 1):
        pass
    one, many = time.reserve_s("pixels"), time.reserve_s("pixels", count=100)
    assert 0 < nothing < one < many
    assert time.reserve_s("pixels", "labels") > one
