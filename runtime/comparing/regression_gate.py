"""The regression gate: fails on evidence that something became slower, and not on noise.

Let M be the slowdown that is tolerated, such as 5%. Each subject has one of three outcomes:

- regressed: it is shown, 95% surely, that the true ratio lies above 1 + M;
- passed: it is shown, 95% surely, that it lies below;
- undecided: neither, so that another outcome would be a guess.

A threshold on the measured ratio alone fails half of the changes that cost just M, and on a
noisy machine many that cost nothing. A test of "no slower at all" fails changes that cost less
than M once enough is measured. Comparing the whole interval with the bound, as for equivalence
and non-inferiority in medicine (Wellek, "Testing Statistical Hypotheses of Equivalence and
Noninferiority", 2010), does neither. Criterion.rs judges by its noise threshold in the same way.

Other programs disturb what is typical more than the fastest run of a process, and a change may
cost some runs only. So both are evidence (see `Comparison.evidence`), each at half the level
(Bonferroni): either shows a regression, or that there is none if neither says otherwise.

With several subjects the evidence against each is held to Holm's levels (Scandinavian Journal of
Statistics 6, 1979), so that a whole run without a regression fails with a chance of 5% at most.
A run passes if every subject does, which needs no such correction (Berger, Technometrics 24,
1982: an intersection-union test).

What a gate can see is decided by the noise: it finds a slowdown of 2 M, and lets one of nothing
pass, each with a chance of 95%, where the standard error of the ratio is at most about M / 4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.comparing.compare_runs import Comparison
from edgeclip.runtime.comparing.ratio_of_runs import RatioOfRuns
from edgeclip.runtime.comparing.what_would_decide import what_would_decide
from edgeclip.runtime.errors import InputError

SURENESS = 0.95
Outcome = Literal["passed", "regressed", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One subject and what the gate made of it.

    Attributes:
        comparison: what was judged.
        outcome: see the module.
        at_least: the true ratio lies above it, 95% surely, all subjects considered.
        at_most: the true ratio lies below it, 95% surely.
        advice: what to measure in order to decide; empty where it is decided.
    """

    comparison: Comparison
    outcome: Outcome
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

    outcome: Outcome
    max_regression: float
    judged: tuple[Judged, ...]
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
        outcome: Outcome = "regressed"
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
) -> Judged:
    evidence, bound = comparison.evidence, 1 + max_regression
    each = _each(sureness, evidence)
    at_most = min(ratio.at_most(_each(SURENESS, evidence)) for ratio in evidence)
    outcome: Outcome = "undecided"
    if comparison.ratio.error is not None:  # a single process on either side shows nothing
        if regressed:
            outcome = "regressed"
        elif at_most < bound and all(ratio.value < bound for ratio in evidence):
            outcome = "passed"
    undecided = outcome == "undecided"
    return Judged(
        comparison=comparison,
        outcome=outcome,
        at_least=max(ratio.at_least(each) for ratio in evidence),
        at_most=at_most,
        advice=what_would_decide(comparison, max_regression, each) if undecided else "",
    )


def _each(sureness: float, evidence: Sequence[RatioOfRuns]) -> float:
    """How sure each of several has to be, for all of them together to be as sure as that."""
    return 1 - (1 - sureness) / len(evidence)
