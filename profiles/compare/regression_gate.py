"""Regression gate: judge each subject "regressed", "passed" or "undecided" with 95% confidence.

"regressed" is shown only by evidence that the true ratio exceeds the tolerated one, "passed" only
by evidence that it lies below; without either the subject is "undecided", and the gate says how
many more processes or repeats would decide. Several subjects are judged together by Holm's method
("A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979), so that
many subjects raise no more false alarms than one. The comparison and the verdicts are printed as
text for a terminal, or as Markdown for a pull request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from edgeclip.profiles.compare.compare_runs import Comparison, RatioEstimate, SetupAspect
from edgeclip.runtime.console import columns, digits
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.student_t import student_t_quantile

CONFIDENCE = 0.95
GateOutcome = Literal["passed", "regressed", "undecided"]

_MAX_PROCESSES = 50  # advised for each run; more would take too long
_MAX_REPEATS = 20  # advised, times the present number


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectVerdict:
    """The gate's verdict on one subject.

    Attributes:
        comparison: the subject's comparison.
        outcome: see the module.
        lower: the true ratio lies above it with 95% confidence, all subjects considered.
        upper: the true ratio lies below it with 95% confidence.
        advice: what to measure in order to decide; empty if it is decided.
    """

    comparison: Comparison
    outcome: GateOutcome
    lower: float
    upper: float
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """The gate's verdict on a whole run.

    Attributes:
        outcome: "regressed" if any subject is; else "undecided" if any is or was not measured.
        max_regression: the tolerated slowdown, 0.05 for 5%.
        judged: one verdict for each subject.
        not_measured: subjects of the baseline that this run lacks.
    """

    outcome: GateOutcome
    max_regression: float
    judged: tuple[SubjectVerdict, ...]
    not_measured: tuple[str, ...]

    def fails(self, *, undecided_fails: bool = False) -> bool:
        """Whether to stop a change: if it regressed, and optionally if it is undecided."""
        return self.outcome == "regressed" or (undecided_fails and self.outcome == "undecided")


def regression_gate(
    comparisons: Sequence[Comparison],
    max_regression: float,
    *,
    allow_difference: bool = False,
    not_measured: Sequence[str] = (),
) -> GateVerdict:
    """Judge the comparisons of two runs.

    Args:
        comparisons: at least one.
        max_regression: the tolerated slowdown: 0.05 for 5%.
        allow_difference: judge by the yardstick if the machines differ. It removes the machines'
            speed, but not what one machine is relatively better at.
        not_measured: subjects of the baseline that are missing now; they are undecided.

    Raises:
        InputError: nothing to judge, a bound that is not above 0, different input shapes, or
            different machines without a yardstick or without `allow_difference`.
    """
    if not comparisons:
        raise InputError("the gate has nothing to judge: no subject was measured in both runs")
    if not 0 < max_regression < math.inf:
        raise InputError(_bound_message(f"{max_regression:g}"))
    for comparison in comparisons:
        _check_comparable(comparison, allow_difference)
    shown = _holm(comparisons, 1 + max_regression)
    judged = tuple(
        _judge(item, max_regression, regressed, confidence)
        for item, (regressed, confidence) in zip(comparisons, shown, strict=True)
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
    """Parse "5%" or "0.05" as 0.05.

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


def _check_comparable(comparison: Comparison, allow_difference: bool) -> None:
    shape = comparison.difference("input shape")
    if shape is not None:
        raise InputError(
            f"{comparison.title} ran on {shape.now} values, and in the baseline on "
            f"{shape.baseline}: that is other work, not a regression; measure the baseline anew "
            "with the same input"
        )
    machine = comparison.difference("machine")
    if machine is None or (allow_difference and comparison.to_yardstick is not None):
        return
    hint = "; with --other-machine the ratios to the yardstick are judged all the same"
    raise InputError(
        f"{comparison.title}: the baseline is of another machine ({machine.baseline}) than this "
        f"run ({machine.now}): measure it anew on this one"
        f"{hint if comparison.to_yardstick is not None else ''}"
    )


def _holm(comparisons: Sequence[Comparison], bound: float) -> list[tuple[bool, float]]:
    """Test by Holm's method which ratios exceed `bound`; also return each test's confidence."""
    p_values = [
        len(item.evidence) * min(ratio.p_value(bound) for ratio in item.evidence)
        for item in comparisons
    ]
    found = [(False, CONFIDENCE)] * len(p_values)
    shown = True
    for step, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        level = (1 - CONFIDENCE) / (len(p_values) - step)
        shown = shown and p_values[at] < level
        found[at] = (shown, 1 - level)
    return found


def _judge(
    comparison: Comparison, max_regression: float, regressed: bool, confidence: float
) -> SubjectVerdict:
    evidence, bound = comparison.evidence, 1 + max_regression
    # Bonferroni: with two ratios as evidence each is tested at half the error level.
    each = 1 - (1 - confidence) / len(evidence)
    upper = min(ratio.upper_bound(1 - (1 - CONFIDENCE) / len(evidence)) for ratio in evidence)
    outcome: GateOutcome = "undecided"
    if comparison.ratio.error is not None:  # a single process on either side shows nothing
        if regressed:
            outcome = "regressed"
        elif upper < bound and all(ratio.value < bound for ratio in evidence):
            outcome = "passed"
    undecided = outcome == "undecided"
    return SubjectVerdict(
        comparison=comparison,
        outcome=outcome,
        lower=max(ratio.lower_bound(each) for ratio in evidence),
        upper=upper,
        advice=required_samples(comparison, max_regression, each) if undecided else "",
    )


def required_samples(comparison: Comparison, max_regression: float, confidence: float) -> str:
    """Say in one sentence how many processes, or repeats, would decide.

    If the noise is too large, enough is asked for to tell a slowdown of twice the tolerated one
    from none. Else the true change lies near the bound, and enough is asked for to tell the
    observed change from the bound.

    Args:
        comparison: an undecided comparison.
        max_regression: the tolerated slowdown, 0.05 for 5%.
        confidence: required of each ratio, such as 0.975.
    """
    if comparison.ratio.error is None:
        return "one process tells nothing of others: measure both runs with 5 processes or more"
    bound = math.log1p(max_regression)
    goal = f"would tell {200 * max_regression:.3g}% slower from no slower"
    advice = _advise(comparison, bound, confidence, f"too noisy: {{}} {goal}")
    if advice is None:
        near = "the change lies near the bound: {} would decide, if it is what it seems"
        distance = abs(math.log(_sharpest(comparison).value) - bound)
        advice = _advise(comparison, distance, confidence, near)
    return advice or "a little more of the same would decide"


def _advise(
    comparison: Comparison, distance: float, confidence: float, template: str
) -> str | None:
    """Say how much more would resolve a log ratio of `distance`; None if there is enough."""
    have = min(comparison.processes)
    processes = _required_processes(comparison, distance, confidence)
    if processes is not None and processes <= have:
        return None
    repeats = _required_repeats(comparison, distance, confidence)
    ways = []
    if processes is not None:
        ways.append(f"{processes} processes in each run ({have} now)")
    if repeats is not None:
        ways.append(f"{repeats} repeats in each process ({comparison.rounds} now)")
    if ways:
        return template.format(f"about {' or '.join(ways)}")
    return template.format(f"not even {_MAX_PROCESSES} processes in each run ({have} now)")


def _required_processes(comparison: Comparison, distance: float, confidence: float) -> int | None:
    """Least number in each run that resolves `distance` with a power of `confidence`, if any."""
    now, baseline = comparison.processes
    harmonic_mean = 2 / (1 / now + 1 / baseline)
    error = (_sharpest(comparison).error or 0.0) * math.sqrt(harmonic_mean)  # of one process
    for count in range(2, _MAX_PROCESSES + 1):
        # Two margins: one for the test's level, one for its power.
        margin = 2 * student_t_quantile(confidence, 2 * (count - 1))
        if margin * error / math.sqrt(count) <= distance:
            return count
    return None


def _required_repeats(comparison: Comparison, distance: float, confidence: float) -> int | None:
    """Least number of runs in each of the same processes that resolves `distance`, if any."""
    ratio = _sharpest(comparison)
    margin = 2 * student_t_quantile(confidence, ratio.degrees or 1.0)
    between = max(0.0, (ratio.error or 0.0) ** 2 - ratio.noise**2)
    left = (distance / margin) ** 2 - between
    times = ratio.noise**2 / left if left > 0 else math.inf
    return math.ceil(times * comparison.rounds) if 1 < times <= _MAX_REPEATS else None


def _sharpest(comparison: Comparison) -> RatioEstimate:
    """Return the ratio with the least standard error."""
    return min(comparison.evidence, key=lambda ratio: ratio.error or 0.0)


_HEADER = (
    "subject",
    "baseline ms",
    "now ms",
    "now / baseline",
    "95% interval",
    "fastest runs",
    "plain times",
)
_MARKS = {"passed": "✅ passed", "regressed": "❌ regressed", "undecided": "⚠️ undecided"}
# Aspects that are the same for all subjects of a run.
_OF_ALL: tuple[SetupAspect, ...] = ("machine", "system", "packages", "workload")
_RUN_NAMES = {"now": "run", "baseline": "baseline"}


def comparison_text(comparisons: Sequence[Comparison], verdict: GateVerdict | None = None) -> str:
    """Format columns for a terminal, then the differences of the runs, then the verdict."""
    rows = [_HEADER, *map(_row, comparisons)]
    if verdict is not None:
        words = ("verdict", *(item.outcome for item in verdict.judged))
        rows = [(*row, word) for row, word in zip(rows, words, strict=True)]
    parts = [columns(rows), *_notes(comparisons)]
    if verdict is not None:
        parts += [*_judgements(verdict), summary(verdict)]
    return "\n".join(parts)


def comparison_markdown(
    comparisons: Sequence[Comparison], verdict: GateVerdict | None = None
) -> str:
    """Format the verdict, if there is one, a table and a list in GitHub's Markdown."""
    rows = [_HEADER, *map(_row, comparisons)]
    if verdict is not None:
        words = ("verdict", *(_MARKS[item.outcome] for item in verdict.judged))
        rows = [(*row, word) for row, word in zip(rows, words, strict=True)]
    rule = ["---", *["---:"] * (len(_HEADER) - 1), *["---"] * (verdict is not None)]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (rows[0], rule, *rows[1:])]
    notes = [*_notes(comparisons), *(_judgements(verdict) if verdict is not None else ())]
    head = [] if verdict is None else [f"**{_cell(summary(verdict))}**", ""]
    tail = ["", *(f"- {_cell(note)}" for note in notes)] if notes else []
    return "\n".join([*head, *lines, *tail]) + "\n"


def summary(verdict: GateVerdict) -> str:
    """Say the verdict on the whole run in one sentence."""
    count, tolerated = len(verdict.judged), _percent(verdict.max_regression)
    if verdict.outcome == "passed":
        return f"PASSED: none of {count} is slower by {tolerated} or more"
    of = [item for item in verdict.judged if item.outcome == verdict.outcome]
    names = ", ".join(item.comparison.title for item in of)
    if verdict.outcome == "regressed":
        return f"REGRESSED: {len(of)} of {count} slower by more than {tolerated}: {names}"
    missing = f"not measured: {', '.join(verdict.not_measured)}" if verdict.not_measured else ""
    unsure = f"cannot tell whether it is slower by more than {tolerated}: {names}" if names else ""
    return f"UNDECIDED: {'; '.join(filter(None, (unsure, missing)))}"


def _row(item: Comparison) -> tuple[str, ...]:
    return (
        item.title,
        digits(item.baseline_ms.value),
        digits(item.now_ms.value),
        f"{item.ratio.value:.3f}",
        _interval(item.ratio),
        f"{item.fastest.value:.3f} ({_interval(item.fastest)})" if item.fastest else "unknown",
        f"{item.times.value:.3f} ({_interval(item.times)})" if item.to_yardstick else "as judged",
    )


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Explain the ratios and list the differences of the runs, each once."""
    lines = []
    if any(item.to_yardstick for item in comparisons):
        lines.append(
            "now / baseline is the ratio of times divided by the yardstick's in the same round; "
            "plain times are not divided; fastest runs are those of each process"
        )
    if not all(item.to_yardstick for item in comparisons):
        lines.append(
            "without a yardstick in both runs, the machine's own speed at either time is part "
            "of the ratio"
        )
    for item in comparisons:
        for found in item.differences:
            prefix = "" if found.what in _OF_ALL else f"{item.title}: "
            lines.append(f"{prefix}{found.what} changed: {found.baseline} -> {found.now}")
        for run in item.disturbed:
            lines.append(f"{item.title}: other programs disturbed the {_RUN_NAMES[run]}")
        if item.ratio.error is None:
            lines.append(f"{item.title}: one process only, so the interval is too narrow")
    return list(dict.fromkeys(lines))


def _judgements(verdict: GateVerdict) -> list[str]:
    return [f"{item.comparison.title}: {_judgement(item)}" for item in verdict.judged]


def _judgement(item: SubjectVerdict) -> str:
    least, most = floor(1000 * (item.lower - 1)) / 10, ceil(1000 * (item.upper - 1)) / 10
    if item.outcome == "regressed":
        return f"regressed, slower by {least:.1f}% at least"
    if item.outcome == "passed" and most < 0:
        return f"passed, faster by {-most:.1f}% at least"
    if item.outcome == "passed":
        return f"passed, slower by {most:.1f}% at most"
    return f"undecided, {least:+.1f}% to {most:+.1f}%; {item.advice}"


def _interval(ratio: RatioEstimate) -> str:
    return f"{ratio.interval.low:.3f} to {ratio.interval.high:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _cell(text: str) -> str:
    """Escape text that would end a table cell or begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
