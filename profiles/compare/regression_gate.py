"""Regression gate: judge each subject "passed", "failed" or "undecided" with 95% confidence.

The evidence on a subject is the ratio of its typical times and that of its fastest runs. A subject
passes only if both are shown to lie inside the bound, and fails, it has regressed, if one of them
is shown to lie outside; several subjects are judged together, see `runtime.stats.three_outcomes`.
Without either it is "undecided", and the gate says how many more processes would decide. The
comparison and the verdicts are printed as text for a terminal, or as Markdown for a pull request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from edgeclip.profiles.compare.compare_runs import Comparison, SetupAspect
from edgeclip.profiles.record.timing_statistics import RatioEstimate
from edgeclip.runtime.console import columns, digits
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.student_t import student_t_quantile
from edgeclip.runtime.stats.three_outcomes import BoundTest, Outcome, judge, overall

CONFIDENCE = 0.95

_MAX_PROCESSES = 50  # advised for each run; more would take too long


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectVerdict:
    """The gate's verdict on one subject.

    Attributes:
        comparison: the subject's comparison.
        outcome: see the module.
        lower: one of its ratios lies above it with 95% confidence, all subjects considered.
        upper: both of its ratios lie below it with 95% confidence.
        advice: what to measure in order to decide; empty if it is decided.
    """

    comparison: Comparison
    outcome: Outcome
    lower: float
    upper: float
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """The gate's verdict on a whole run.

    Attributes:
        outcome: "failed" if any subject is; else "undecided" if any is or was not measured.
        max_regression: the tolerated slowdown, 0.05 for 5%.
        judged: one verdict for each subject.
        not_measured: subjects of the baseline that this run lacks.
    """

    outcome: Outcome
    max_regression: float
    judged: tuple[SubjectVerdict, ...]
    not_measured: tuple[str, ...]

    def fails(self, *, undecided_fails: bool = False) -> bool:
        """Whether to stop a change: if it regressed, and optionally if it is undecided."""
        return self.outcome == "failed" or (undecided_fails and self.outcome == "undecided")


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
    bound = 1 + max_regression
    outcomes = judge([BoundTest(item.evidence, "<=", bound) for item in comparisons], CONFIDENCE)
    each = 1 - (1 - CONFIDENCE) / sum(len(item.evidence) for item in comparisons)
    judged = tuple(
        _verdict(item, outcome, max_regression, each)
        for item, outcome in zip(comparisons, outcomes, strict=True)
    )
    missing: tuple[Outcome, ...] = ("undecided",) if not_measured else ()
    return GateVerdict(
        outcome=overall((*outcomes, *missing)),
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


def _verdict(
    comparison: Comparison, outcome: Outcome, max_regression: float, each: float
) -> SubjectVerdict:
    """Add the bounds that are shown; `each` is the confidence of one of all ratios (Bonferroni)."""
    evidence, bound = comparison.evidence, 1 + max_regression
    lower = max(ratio.lower_bound(each) for ratio in evidence)
    return SubjectVerdict(
        comparison=comparison,
        outcome=outcome,
        # Holm's method may show that the bound is exceeded, and then shows no more than that.
        lower=max(lower, bound) if outcome == "failed" else lower,
        upper=max(ratio.upper_bound(CONFIDENCE) for ratio in evidence),
        advice=required_samples(comparison, max_regression, each) if outcome == "undecided" else "",
    )


def required_samples(comparison: Comparison, max_regression: float, confidence: float) -> str:
    """Say in one sentence how many processes would decide.

    If the noise is too large, enough is asked for to tell a slowdown of twice the tolerated one
    from none. Else the true change lies near the bound, and enough is asked for to tell the
    observed change from the bound.

    Args:
        comparison: an undecided comparison.
        max_regression: the tolerated slowdown, 0.05 for 5%.
        confidence: required of each ratio, such as 0.975.
    """
    if not math.isfinite(comparison.ratio.error):
        return "one process tells nothing of others: measure both runs with 5 processes or more"
    have, bound = min(comparison.processes), math.log1p(max_regression)
    needed = [
        _required_processes(comparison, ratio, bound, confidence) for ratio in comparison.evidence
    ]
    most = max(needed)  # both ratios must be known to pass
    if most > have:
        goal = f"would tell {200 * max_regression:.3g}% slower from no slower"
        return f"too noisy: {_processes(most, have)} {goal}"
    distances = [math.log(ratio.value) - bound for ratio in comparison.evidence]
    needed = [
        _required_processes(comparison, ratio, abs(distance), confidence)
        for ratio, distance in zip(comparison.evidence, distances, strict=True)
    ]
    beyond = [count for count, distance in zip(needed, distances, strict=True) if distance > 0]
    count = min(beyond, default=max(needed))  # one ratio is enough to fail
    if count <= have:
        return "a little more of the same would decide"
    ways = _processes(count, have)
    return f"the change lies near the bound: {ways} would decide, if it is what it seems"


def _processes(needed: int, have: int) -> str:
    some = f"about {needed}" if needed <= _MAX_PROCESSES else f"not even {_MAX_PROCESSES}"
    return f"{some} processes in each run ({have} now)"


def _required_processes(
    comparison: Comparison, ratio: RatioEstimate, distance: float, confidence: float
) -> int:
    """Return the least number in each run that resolves `distance` with a power of `confidence`.

    One more than is advised at most if that is not enough.
    """
    now, baseline = comparison.processes
    harmonic_mean = 2 / (1 / now + 1 / baseline)
    error = ratio.error * math.sqrt(harmonic_mean)  # of one process
    for count in range(2, _MAX_PROCESSES + 1):
        # Two margins: one for the test's level, one for its power.
        margin = 2 * student_t_quantile(confidence, 2 * (count - 1))
        if margin * error / math.sqrt(count) <= distance:
            return count
    return _MAX_PROCESSES + 1


_HEADER = (
    "subject",
    "baseline ms",
    "now ms",
    "now / baseline",
    "95% interval",
    "fastest runs",
    "plain times",
)
_WORDS: dict[Outcome, str] = {
    "passed": "passed",
    "failed": "regressed",
    "undecided": "undecided",
}
_MARKS: dict[Outcome, str] = {"passed": "✅", "failed": "❌", "undecided": "⚠️"}
# Aspects that are the same for all subjects of a run.
_OF_ALL: tuple[SetupAspect, ...] = ("machine", "system", "packages", "workload")
_RUN_NAMES = {"now": "run", "baseline": "baseline"}


def comparison_text(comparisons: Sequence[Comparison], verdict: GateVerdict | None = None) -> str:
    """Format columns for a terminal, then the differences of the runs, then the verdict."""
    rows = [_HEADER, *map(_row, comparisons)]
    if verdict is not None:
        words = ("verdict", *(_WORDS[item.outcome] for item in verdict.judged))
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
        marked = (f"{_MARKS[item.outcome]} {_WORDS[item.outcome]}" for item in verdict.judged)
        words = ("verdict", *marked)
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
    if verdict.outcome == "failed":
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
        if not math.isfinite(item.ratio.error):
            lines.append(f"{item.title}: one process only, which tells nothing of others")
    return list(dict.fromkeys(lines))


def _judgements(verdict: GateVerdict) -> list[str]:
    return [f"{item.comparison.title}: {_judgement(item)}" for item in verdict.judged]


def _judgement(item: SubjectVerdict) -> str:
    if not math.isfinite(item.upper):
        return f"undecided; {item.advice}"
    least, most = floor(1000 * (item.lower - 1)) / 10, ceil(1000 * (item.upper - 1)) / 10
    if item.outcome == "failed":
        return f"regressed, slower by {least:.1f}% at least"
    if item.outcome == "passed" and most < 0:
        return f"passed, faster by {-most:.1f}% at least"
    if item.outcome == "passed":
        return f"passed, slower by {most:.1f}% at most"
    return f"undecided, {least:+.1f}% to {most:+.1f}%; {item.advice}"


def _interval(ratio: RatioEstimate) -> str:
    if not math.isfinite(ratio.error):
        return "unknown"
    return f"{ratio.interval.low:.3f} to {ratio.interval.high:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _cell(text: str) -> str:
    """Escape text that would end a table cell or begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
