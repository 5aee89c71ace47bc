"""The head of a profile's report: what disturbed it, and the figures that matter."""

import math
from collections.abc import Sequence
from operator import truediv

import numpy as np

from edgeclip.profiles.compare.compare_runs import estimate_ratio
from edgeclip.profiles.record.conditions import Interference
from edgeclip.profiles.record.measurement import MeasurementRun, SweepPoint
from edgeclip.profiles.record.timing_statistics import (
    RatioEstimate,
    estimate_paired_ratio,
    process_medians,
    surely_below,
)
from edgeclip.profiles.report.profile_data import (
    PART_NAMES,
    NamedRun,
    Subject,
    SubjectQuality,
    full_name,
)
from edgeclip.profiles.report.profile_quality import quality_of, quality_span, quality_text
from edgeclip.profiles.report.profile_speed import threads_name
from edgeclip.profiles.report.sections import (
    Alarm,
    Card,
    PageSummary,
    Tone,
    count,
    ratio_span,
    span,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import digits, percent

_SERVER = "server"  # of `Measurement.missing`: answers that the server had no part in


def summary_of(
    runs: Sequence[NamedRun], subjects: Sequence[Subject], quality: Sequence[SubjectQuality]
) -> PageSummary:
    """Build the head of the page: a verdict on the machine, alarms, and the key figures."""
    alarms = tuple(alarms_of(runs, subjects))
    verdict, tone = _verdict(alarms, runs)
    return PageSummary(verdict, tone, alarms, tuple(_cards(subjects, quality)))


def _verdict(alarms: Sequence[Alarm], runs: Sequence[NamedRun]) -> tuple[str, Tone]:
    if any(_slowed(source.run) for source in runs):
        which, whose = ("The", "these") if len(runs) == 1 else ("A", "its")
        words = f"{which} machine was disturbed or throttled: do not trust {whose} times."
        return words, "miss"
    if any(alarm.tone == "miss" for alarm in alarms):
        return "Some of these figures need care.", "miss"
    if any(_unknown(source.run) for source in runs):
        return "Whether the machine was disturbed is not known.", ""
    return "The machine was left alone while it was measured.", "pass"


def _slowed(run: MeasurementRun) -> bool:
    found = run.interference
    measured = found is not None and (found.disturbed is True or found.throttled is True)
    return measured or any(item.contended for item in run.measurements)


def _unknown(run: MeasurementRun) -> bool:
    if run.interference is not None:
        return run.interference.disturbed is None
    return any(item.contended is None for item in run.measurements)


def alarms_of(runs: Sequence[NamedRun], subjects: Sequence[Subject]) -> list[Alarm]:
    """Everything that makes figures doubtful, the loudest first."""
    loud: list[Alarm] = []
    quiet: list[Alarm] = []
    for source in runs:
        who = "" if len(runs) == 1 else f"{source.name}: "
        loud += _disturbances(source.run, who)
        if source.run.interference is not None and source.run.interference.throttled is None:
            words = f"{who}Whether the processor was slowed for its heat cannot be told here."
            quiet.append(Alarm(words, ""))
    restless = [full_name(s) for s in subjects if not s.item.warm_up.settled]
    if restless:
        loud.append(Alarm(f"Not steady after warm-up: {', '.join(restless)}.", "miss"))
    invalid = [
        f"{full_name(s)} {result.scenario}"
        for s in subjects
        for result in s.item.scenarios
        if not result.valid
    ]
    if invalid:
        loud.append(Alarm(f"INVALID by LoadGen's own rules: {', '.join(invalid)}.", "miss"))
    for subject in subjects:
        told = [reason for key, reason in subject.item.missing if key == _SERVER]
        loud += [Alarm(f"{full_name(subject)}: {reason}.", "miss") for reason in told]
    quiet += _differences(runs)
    return [*loud, *quiet]


def _disturbances(run: MeasurementRun, who: str) -> list[Alarm]:
    found = run.interference
    alarms = []
    if found is not None and found.disturbed:
        reasons = "; ".join(found.reasons) or interference_words(found)
        words = f"{who}DISTURBED while it was measured: {reasons}. Ratios hold better than times; "
        alarms.append(Alarm(f"{words}measure again on a quiet machine.", "miss"))
    if found is not None and found.throttled:
        words = f"{who}THROTTLED: a processor was slowed. Cool it, or see to its power supply."
        alarms.append(Alarm(words, "miss"))
    contended = [f"{i.name} ({PART_NAMES[i.part]})" for i in run.measurements if i.contended]
    if contended and not (found is not None and found.disturbed):
        words = f"{who}CONTENDED: more than 10% of the CPU time was denied to "
        alarms.append(Alarm(f"{words}{', '.join(contended)}.", "miss"))
    return alarms


def interference_words(interference: Interference) -> str:
    """The shares that could be told: "0.4% waiting, 0.0% stolen, 1.2% used by others"."""
    shares = (
        ("waiting", interference.waiting_share),
        ("stolen", interference.steal_share),
        ("used by others", interference.others_share),
    )
    told = [f"{percent(share)} {name}" for name, share in shares if share is not None]
    return ", ".join(told) or "nothing could be told"


def _differences(runs: Sequence[NamedRun]) -> list[Alarm]:
    """Tell in what runs differ: processor, system, packages, workload, device."""
    if len(runs) < 2:
        return []
    facts: dict[str, list[object]] = {
        "processors": [source.run.machine.cpu for source in runs],
        "numbers of cores": [source.run.machine.cores for source in runs],
        "systems": [source.run.machine.os for source in runs],
        "package versions": [source.run.machine.packages for source in runs],
        "workloads": [_workload(source.run.workload) for source in runs],
        "devices": [source.run.device for source in runs],
    }
    names = [name for name, values in facts.items() if any(v != values[0] for v in values)]
    if not names:
        return [Alarm(f"All runs are of one kind of machine: {runs[0].run.machine.cpu}.", "")]
    return [Alarm(f"The runs differ in their {', '.join(names)}: see the environment.", "")]


def _workload(workload: Workload) -> tuple[object, ...]:
    return (workload.timed_runs, workload.batch_sizes, workload.threads)


def _cards(subjects: Sequence[Subject], quality: Sequence[SubjectQuality]) -> list[Card]:
    """The fastest of the first part, the best throughput, and quality, energy or start."""
    if not subjects:
        return []
    main = [s for s in subjects if s.item.part == subjects[0].item.part]
    fastest = min(main, key=lambda s: s.item.latency.p50_ms.value)
    cards = [_latency_card(fastest, main), _throughput_card(main)]
    cards.append(_quality_card(fastest, quality) or _energy_card(main) or _start_card(fastest))
    return [card for card in cards if card is not None]


def _latency_card(subject: Subject, others: Sequence[Subject]) -> Card:
    latency, ratio = subject.item.latency, subject.item.ratio
    notes = [subject.label]
    if ratio is not None:
        notes.append(
            f"{ratio.ratio.value:.3f} of {ratio.reference}'s time ({ratio_span(ratio.ratio)})"
        )
    if latency.p99_ms is not None:
        notes.append(f"p99 {digits(latency.p99_ms.value)} ms ({span(latency.p99_ms)})")
    notes += _not_surely_faster(subject, others)
    return Card(
        name=f"Fastest p50, {PART_NAMES[subject.item.part]}",
        figure=f"{digits(latency.p50_ms.value)} ms",
        interval=span(latency.p50_ms),
        note="; ".join(notes),
    )


def _not_surely_faster(subject: Subject, others: Sequence[Subject]) -> list[str]:
    """Name the subjects that are perhaps as fast, and say where nothing could be shown."""
    rivals = [other for other in others if other is not subject]
    ratios = [_ratio_to(subject, other) for other in rivals]
    surely = surely_below(ratios)
    near = [s.label for s, faster in zip(rivals, surely, strict=True) if not faster]
    if not near:
        return []
    unknown = any(not math.isfinite(ratio.error) for ratio in ratios)
    why = ": one process tells nothing of others" if unknown else ""
    return [f"not surely faster than {', '.join(near)}{why}"]


def _ratio_to(subject: Subject, other: Subject) -> RatioEstimate:
    """The ratio of times over processes: of the same rounds where both ran in them."""
    ours, theirs = ([np.array(runs) for runs in s.item.samples_ms] for s in (subject, other))
    together = subject.source is other.source and list(map(len, ours)) == list(map(len, theirs))
    if not ours or not theirs:
        values = (s.item.latency.p50_ms.value for s in (subject, other))
        return RatioEstimate(value=truediv(*values), error=math.inf, degrees=0)
    if together:
        return estimate_paired_ratio(ours, theirs)
    return estimate_ratio(process_medians(ours), process_medians(theirs))


def _throughput_card(subjects: Sequence[Subject]) -> Card | None:
    points: list[tuple[SweepPoint, Subject]] = [(p, s) for s in subjects for p in s.item.sweep]
    if not points:
        return None
    point, subject = max(points, key=lambda pair: pair[0].items_per_s.value)
    where = "" if point.threads is None else f", {threads_name(point.threads)}"
    return Card(
        name=f"Highest throughput, {PART_NAMES[subject.item.part]}",
        figure=f"{digits(point.items_per_s.value)}/s",
        interval=span(point.items_per_s),
        note=f"{subject.label}; batch {count(point.batch)}{where}, "
        f"{digits(point.p50_ms.value)} ms a batch",
    )


def _quality_card(subject: Subject, quality: Sequence[SubjectQuality]) -> Card | None:
    found = quality_of(subject, quality)
    if not found:
        return None
    one = found[0]
    return Card(
        name=f"{one.metric}, of the fastest",
        figure=quality_text(one.value.value, one.unit),
        interval=quality_span(one),
        note=subject.label,
    )


def _energy_card(subjects: Sequence[Subject]) -> Card | None:
    told = [(s.item.energy.joules, s) for s in subjects if s.item.energy is not None]
    if not told:
        return None
    joules, subject = min(told, key=lambda pair: pair[0].value)
    return Card(
        name="Least energy an item",
        figure=f"{digits(1e3 * joules.value)} mJ",
        interval=span(joules, scale=1e3),
        note=subject.label,
    )


def _start_card(subject: Subject) -> Card | None:
    start = subject.item.cold_start
    if start is None:
        return None
    found = start.intervals
    return Card(
        name="From a fresh process to its first answer",
        figure=f"{digits(start.total_ms)} ms",
        interval="no interval" if found is None else span(found.total_ms),
        note=subject.label,
    )
