"""Regression gate: fail on evidence of a slowdown; say how much more to measure if undecided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeclip.profiles.compare.compare_runs import Comparison, RatioOfRuns
from edgeclip.profiles.record.timing_statistics import student_t_quantile
from edgeclip.runtime.errors import InputError

_MOST_PROCESSES = 50  # in each run; more are not worth the time
_MOST_REPEATS = 20  # times those of now


def required_samples(comparison: Comparison, max_regression: float, sureness: float) -> str:
    """One sentence that says how many processes, or repeats, would decide.

    Noise comes first: what is measured should tell a slowdown of nothing from one of twice what
    is tolerated. Where it does, the true change lies near the bound, and the distance from there
    counts that was seen.

    Args:
        comparison: what could not be decided.
        max_regression: the slowdown that is tolerated, 0.05 for 5%.
        sureness: that the gate demands of each evidence, such as 0.975.
    """
    if comparison.ratio.error is None:
        return "one process tells nothing of others: measure both runs with 5 processes or more"
    bound = math.log1p(max_regression)
    goal = f"would tell {200 * max_regression:.3g}% slower from no slower"
    advice = _more(comparison, bound, sureness, f"too noisy: {{}} {goal}")
    if advice is None:
        near = "the change lies near the bound: {} would decide, if it is what it seems"
        distance = abs(math.log(_sharpest(comparison).value) - bound)
        advice = _more(comparison, distance, sureness, near)
    return advice or "a little more of the same would decide"


def _more(comparison: Comparison, distance: float, sureness: float, words: str) -> str | None:
    """What has to be added to see that distance; None if there is enough of everything."""
    have = min(comparison.processes)
    processes = _processes(comparison, distance, sureness)
    if processes is not None and processes <= have:
        return None
    repeats = _repeats(comparison, distance, sureness)
    ways = []
    if processes is not None:
        ways.append(f"{processes} processes in each run ({have} now)")
    if repeats is not None:
        ways.append(f"{repeats} repeats in each process ({comparison.rounds} now)")
    if ways:
        return words.format(f"about {' or '.join(ways)}")
    return words.format(f"not even {_MOST_PROCESSES} processes in each run ({have} now)")


def _processes(comparison: Comparison, distance: float, sureness: float) -> int | None:
    """The fewest in each run that see that distance with a chance of `sureness`, if any."""
    error = (_sharpest(comparison).error or 0.0) * math.sqrt(_mean_count(comparison))
    for count in range(2, _MOST_PROCESSES + 1):
        # Two margins: one for the evidence, one that it is there when it should be.
        if 2 * student_t_quantile(sureness, 2 * (count - 1)) * error / math.sqrt(count) <= distance:
            return count
    return None


def _repeats(comparison: Comparison, distance: float, sureness: float) -> int | None:
    """The fewest runs in each of the same processes that do so too, if any."""
    ratio = _sharpest(comparison)
    margin = 2 * student_t_quantile(sureness, ratio.degrees or 1.0)
    between = max(0.0, (ratio.error or 0.0) ** 2 - ratio.noise**2)
    left = (distance / margin) ** 2 - between
    times = ratio.noise**2 / left if left > 0 else math.inf
    return math.ceil(times * comparison.rounds) if 1 < times <= _MOST_REPEATS else None


def _sharpest(comparison: Comparison) -> RatioOfRuns:
    """The evidence that says most."""
    return min(comparison.evidence, key=lambda ratio: ratio.error or 0.0)


def _mean_count(comparison: Comparison) -> float:
    """The harmonic mean of both runs' processes, which is what counts for the error."""
    now, baseline = comparison.processes
    return 2 / (1 / now + 1 / baseline)


SURENESS = 0.95
GateOutcome = Literal["passed", "regressed", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectVerdict:
    """One subject and what the gate made of it.

    Attributes:
        comparison: what was judged.
        outcome: see the module.
        at_least: the true ratio lies above it, 95% surely, all subjects considered.
        at_most: the true ratio lies below it, 95% surely.
        advice: what to measure in order to decide; empty where it is decided.
    """

    comparison: Comparison
    outcome: GateOutcome
    at_least: float
    at_most: float
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """What the gate made of a whole run.

    Attributes:
        outcome: "regressed" if any subject is; else "undecided" if any is, or is not there.
        max_regression: the slowdown that is tolerated, 0.05 for 5%.
        judged: the subjects.
        not_measured: subjects of the baseline that this run left out.
    """

    outcome: GateOutcome
    max_regression: float
    judged: tuple[SubjectVerdict, ...]
    not_measured: tuple[str, ...]

    def fails(self, *, undecided_fails: bool = False) -> bool:
        """Whether to stop a change: always if it regressed, and if wished while undecided."""
        return self.outcome == "regressed" or (undecided_fails and self.outcome == "undecided")


def regression_gate(
    comparisons: Sequence[Comparison],
    max_regression: float,
    *,
    allow_difference: bool = False,
    not_measured: Sequence[str] = (),
) -> GateVerdict:
    """Judge what `compare_runs` found.

    Args:
        comparisons: at least one.
        max_regression: the slowdown that is tolerated: 0.05 for 5%.
        allow_difference: judge by the yardstick where the machines differ. It leaves out how
            fast they are, and not what the one is better at than the other.
        not_measured: subjects of the baseline that are missing now; they stay undecided.

    Raises:
        InputError: nothing to judge, a bound that is not above 0, another input shape, or
            another machine without the yardstick or the permission.
    """
    if not comparisons:
        raise InputError("the gate has nothing to judge: no subject was measured in both runs")
    if not 0 < max_regression < math.inf:
        raise InputError(_bound_message(f"{max_regression:g}"))
    for comparison in comparisons:
        _refuse_unlike(comparison, allow_difference)
    evidence = _evidence(comparisons, 1 + max_regression)
    judged = tuple(
        _judge(item, max_regression, regressed, sureness)
        for item, (regressed, sureness) in zip(comparisons, evidence, strict=True)
    )
    outcomes = {item.outcome for item in judged}
    if "regressed" in outcomes:
        outcome: GateOutcome = "regressed"
    else:
        outcome = "undecided" if "undecided" in outcomes or not_measured else "passed"
    return GateVerdict(
        outcome=outcome,
        max_regression=max_regression,
        judged=judged,
        not_measured=tuple(not_measured),
    )


def parse_max_regression(text: str) -> float:
    """Read "5%" or "0.05" as 0.05.

    Raises:
        InputError: neither, or not above 0.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise InputError(_bound_message(repr(text))) from None
    if not 0 < value < math.inf:
        raise InputError(_bound_message(repr(text)))
    if value >= 1 and not percent:
        raise InputError(f"--max-regression {text} is {value:.0%}: write {text}% if you mean that")
    return value


def _bound_message(given: str) -> str:
    return (
        f"--max-regression is {given}: give a share above 0, such as 5% or 0.05; no measurement "
        "can show that nothing at all was lost"
    )


def _refuse_unlike(comparison: Comparison, allowed: bool) -> None:
    title = f"{comparison.part} {comparison.name}"
    shape = comparison.difference("input shape")
    if shape is not None:
        raise InputError(
            f"{title} ran on {shape.now} values, and in the baseline on {shape.baseline}: that is "
            "other work, not a regression; measure the baseline anew with the same input"
        )
    machine = comparison.difference("machine")
    if machine is None or (allowed and comparison.to_yardstick is not None):
        return
    mend = "; with --other-machine the ratios to the yardstick are judged all the same"
    raise InputError(
        f"{title}: the baseline is of another machine ({machine.baseline}) than this run "
        f"({machine.now}): measure it anew on this one"
        f"{mend if comparison.to_yardstick is not None else ''}"
    )


def _evidence(comparisons: Sequence[Comparison], bound: float) -> list[tuple[bool, float]]:
    """Whether each is shown to lie above `bound`, and how sure that had to be, by Holm's steps."""
    chances = [
        len(item.evidence) * min(ratio.chance(bound) for ratio in item.evidence)
        for item in comparisons
    ]
    found = [(False, SURENESS)] * len(chances)
    shown = True
    for step, at in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        level = (1 - SURENESS) / (len(chances) - step)
        shown = shown and chances[at] < level
        found[at] = (shown, 1 - level)
    return found


def _judge(
    comparison: Comparison, max_regression: float, regressed: bool, sureness: float
) -> SubjectVerdict:
    evidence, bound = comparison.evidence, 1 + max_regression
    each = _each(sureness, evidence)
    at_most = min(ratio.at_most(_each(SURENESS, evidence)) for ratio in evidence)
    outcome: GateOutcome = "undecided"
    if comparison.ratio.error is not None:  # a single process on either side shows nothing
        if regressed:
            outcome = "regressed"
        elif at_most < bound and all(ratio.value < bound for ratio in evidence):
            outcome = "passed"
    undecided = outcome == "undecided"
    return SubjectVerdict(
        comparison=comparison,
        outcome=outcome,
        at_least=max(ratio.at_least(each) for ratio in evidence),
        at_most=at_most,
        advice=required_samples(comparison, max_regression, each) if undecided else "",
    )


def _each(sureness: float, evidence: Sequence[RatioOfRuns]) -> float:
    """How sure each of several has to be, for all of them together to be as sure as that."""
    return 1 - (1 - sureness) / len(evidence)
