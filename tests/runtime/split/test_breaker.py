import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.resilience import BreakerRules, CircuitBreaker, Permit
from tests.runtime.conftest import Clock

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
