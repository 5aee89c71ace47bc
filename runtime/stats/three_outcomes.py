"""Judge bounds with three outcomes: passed, failed, or undecided by what was measured.

"passed" needs evidence that the bound holds and "failed" evidence that it does not; without either
the data do not decide. Several bounds hold together only if each of them is shown to hold, at the
full confidence each (intersection-union test; Berger, Technometrics 24, 1982). That one of them
fails is shown by Holm's method ("A simple sequentially rejective multiple test procedure", Scand.
J. Statist. 6, 1979), so that many bounds raise no more false alarms than one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.stats.interval import Estimate

Outcome = Literal["passed", "failed", "undecided"]
Direction = Literal[">=", "<="]


@dataclass(frozen=True, slots=True, eq=False)
class BoundTest:
    """A bound, and the estimates that must all keep it."""

    estimates: tuple[Estimate, ...]
    direction: Direction
    bound: float


def judge(tests: Sequence[BoundTest], confidence: float = 0.95) -> tuple[Outcome, ...]:
    """Judge bounds together.

    Args:
        tests: the bounds.
        confidence: a bound that does not hold is "passed" with probability 1 - confidence at most;
            likewise some bound that holds is "failed", over all tests.

    Returns:
        The outcome of each test.
    """
    failed = _failed(tests, confidence)
    return tuple(
        "failed" if at in failed else "passed" if _holds(test, confidence) else "undecided"
        for at, test in enumerate(tests)
    )


def overall(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of several together: failed if any is, passed only if all are."""
    found = set(outcomes)
    return "failed" if "failed" in found else "undecided" if "undecided" in found else "passed"


def _holds(test: BoundTest, confidence: float) -> bool:
    if test.direction == ">=":
        return all(item.lower_bound(confidence) >= test.bound for item in test.estimates)
    return all(item.upper_bound(confidence) <= test.bound for item in test.estimates)


def _is_outside(item: Estimate, test: BoundTest, confidence: float) -> bool:
    if test.direction == ">=":
        return item.upper_bound(confidence) < test.bound
    return item.lower_bound(confidence) > test.bound


def _failed(tests: Sequence[BoundTest], confidence: float) -> set[int]:
    """Return which tests have an estimate outside, by Holm's method over all estimates."""
    left = [(at, item) for at, test in enumerate(tests) for item in test.estimates]
    failed: set[int] = set()
    while left:
        level = 1 - (1 - confidence) / len(left)
        outside = [(at, item) for at, item in left if _is_outside(item, tests[at], level)]
        if not outside:
            break
        failed |= {at for at, _ in outside}
        left = [pair for pair in left if pair not in outside]
    return failed
