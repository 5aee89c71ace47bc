"""What was measured, under which conditions, and how to repeat it, as sections."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from edgeclip.profiles.record.conditions import MachineConditions
from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.report.profile_data import PART_NAMES, NamedRun, Subject, missing_notes
from edgeclip.profiles.report.sections import (
    NOT_AVAILABLE,
    Cell,
    Commands,
    Note,
    Section,
    Table,
    columns,
    count,
    section_of,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import megabytes, percent

Fact = tuple[str, Callable[[MeasurementRun], str]]
_CHANGED = "⟶"


def identity_section(subjects: Sequence[Subject]) -> Section | None:
    """Table of what was measured: bundle, precision, engine, threads, input shape, size."""
    rows = []
    for subject in subjects:
        identity = subject.item.identity
        if identity is None:
            continue
        rows.append(
            (
                Cell(subject.label, PART_NAMES[subject.item.part]),
                Cell(identity.bundle, f"sha256 {identity.sha256[:12]}"),
                Cell(identity.precision or "as it is"),
                Cell(identity.engine, identity.provider),
                Cell(count(identity.threads)),
                Cell(" × ".join(map(str, identity.input_shape))),
                Cell(megabytes(identity.bytes_on_disk)),
            )
        )
    if not rows:
        return None
    head = columns(
        "<subject", "<bundle", "<precision", "<engine", "threads", "input at batch 1", "on disk"
    )
    table = Table(name="Subjects", columns=head, rows=tuple(rows))
    return Section(anchor="subjects", title="What was measured", blocks=(table,))


def absent_section(subjects: Sequence[Subject], claimed: Iterable[str]) -> Section | None:
    """What could not be measured and belongs to no other section."""
    known = set(claimed)
    keys = dict.fromkeys(key for s in subjects for key, _ in s.item.missing if key not in known)
    notes = missing_notes(subjects, keys, remark=True)
    return section_of("missing", "Not measured, and remarks", notes)


def environment_section(runs: Sequence[NamedRun]) -> Section:
    """Machine, packages and conditions of each run, and where runs differ."""
    table = Table(
        name="Environment",
        columns=columns("<", *(f"<{source.name}" for source in runs)),
        rows=tuple(environment_rows(runs)),
    )
    words = (
        f"Where two values stand, the first is before the timed runs and the second ({_CHANGED}) "
    )
    return Section(
        anchor="environment",
        title="Environment",
        blocks=(Note(f"{words}after them."), table),
    )


def environment_rows(runs: Sequence[NamedRun]) -> list[tuple[Cell, ...]]:
    """A row for each fact that any run tells; "differs" where the runs do not agree.

    Conditions that were asked for, and that no sensor told, are not left out.
    """
    all_runs = [source.run for source in runs]
    rows = []
    watched = any(run.before or run.after or run.interference for run in all_runs)
    conditions = {name for name, _ in _CONDITIONS} if watched else set()
    for name, tell in (*_MACHINE, *_packages(all_runs), *_CONDITIONS, *_sensors(all_runs)):
        values = [tell(run) for run in all_runs]
        if not any(values) and name not in conditions:
            continue
        differs = name not in _OWN and len(set(values)) > 1
        cells = (Cell(value or NOT_AVAILABLE) for value in values)
        rows.append((Cell(name, "differs" if differs else ""), *cells))
    return rows


def repeat_section(runs: Sequence[NamedRun]) -> Section:
    """The commands to measure it again."""
    lines = []
    for source in runs:
        if len(runs) > 1:
            lines.append(f"# {source.name}, {source.run.created}")
        lines.append(source.run.command)
    return Section(anchor="repeat", title="How to repeat it", blocks=(Commands(tuple(lines)),))


def _workload(workload: Workload) -> str:
    batches = ", ".join(map(str, workload.batch_sizes))
    return f"{workload.name}: {workload.timed_runs}; batches {batches}"


def _memory(run: MeasurementRun) -> str:
    megabyte = run.machine.memory_mb
    return "" if megabyte is None else f"{megabyte:,} MB"


def _device(run: MeasurementRun) -> str:
    device = run.device
    return "" if device is None else f"{device.name}: {device.engine}, {device.threads} threads"


_OWN = ("measured",)  # facts that differ in any two runs
_MACHINE: tuple[Fact, ...] = (
    ("measured", lambda run: run.created),
    ("workload", lambda run: _workload(run.workload)),
    ("device", _device),
    ("processor", lambda run: run.machine.cpu),
    ("cores", lambda run: str(run.machine.cores)),
    ("instructions", lambda run: " ".join(run.machine.flags)),
    ("memory", _memory),
    ("system", lambda run: run.machine.os),
    ("Python", lambda run: run.machine.python),
)


def _packages(runs: Sequence[MeasurementRun]) -> list[Fact]:
    names = dict.fromkeys(name for run in runs for name, _ in run.machine.packages)

    def fact(name: str) -> Fact:
        return name, lambda run: dict(run.machine.packages).get(name, "")

    return [fact(name) for name in names]


def _both(run: MeasurementRun, tell: Callable[[MachineConditions], str]) -> str:
    """A condition before and after, once if it stayed."""
    before = "" if run.before is None else tell(run.before)
    after = "" if run.after is None else tell(run.after)
    if before == after or not (before and after):
        return before or after
    return f"{before} {_CHANGED} {after}"


def _clock(conditions: MachineConditions) -> str:
    clocks = conditions.cpu_mhz
    if not clocks:
        return ""
    middle = f"{statistics.median(clocks):,.0f} MHz"
    low, high = f"{min(clocks):,.0f}", f"{max(clocks):,.0f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def _hottest(conditions: MachineConditions) -> str:
    """The highest temperature of all sensors."""
    heat = [value for _, value in conditions.temperatures_c]
    return f"at most {max(heat):.0f} °C" if heat else ""


def _load(conditions: MachineConditions) -> str:
    return "" if conditions.load_1m is None else f"{conditions.load_1m:.2f}"


def _share(tell: Callable[[MeasurementRun], float | None]) -> Callable[[MeasurementRun], str]:
    def words(run: MeasurementRun) -> str:
        share = tell(run)
        return "" if share is None else percent(share)

    return words


def _judgement(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


_CONDITIONS: tuple[Fact, ...] = (
    ("clock, median", lambda run: _both(run, _clock)),
    ("governor", lambda run: _both(run, lambda c: c.governor or "")),
    ("temperatures", lambda run: _both(run, _hottest)),
    ("load, last minute", lambda run: _both(run, _load)),
    (
        "CPU time waited for",
        _share(lambda run: None if run.interference is None else run.interference.waiting_share),
    ),
    (
        "CPU time stolen",
        _share(lambda run: None if run.interference is None else run.interference.steal_share),
    ),
    (
        "CPU time of others",
        _share(lambda run: None if run.interference is None else run.interference.others_share),
    ),
    (
        "throttled",
        lambda run: "" if run.interference is None else _judgement(run.interference.throttled),
    ),
    (
        "disturbed",
        lambda run: "" if run.interference is None else _judgement(run.interference.disturbed),
    ),
)


def _sensors(runs: Sequence[MeasurementRun]) -> list[Fact]:
    """Temperatures, throttle counters and values of the GPU, each under its own name."""
    seen = [c for run in runs for c in (run.before, run.after) if c is not None]
    heat = dict.fromkeys(name for c in seen for name, _ in c.temperatures_c)
    slow = dict.fromkeys(name for c in seen for name, _ in c.throttle_counts)
    gpu = dict.fromkeys(name for c in seen for name, _ in c.gpu)
    return [
        *(_sensor(f"temperature, {n}", n, _degrees) for n in heat),
        *(_sensor(f"throttled, {n}", n, _counts) for n in slow),
        *(_sensor(f"GPU, {n}", n, lambda c: dict(c.gpu)) for n in gpu),
    ]


def _sensor(title: str, name: str, values: Callable[[MachineConditions], dict[str, str]]) -> Fact:
    return title, lambda run: _both(run, lambda c: values(c).get(name, ""))


def _degrees(conditions: MachineConditions) -> dict[str, str]:
    return {name: f"{value:.0f} °C" for name, value in conditions.temperatures_c}


def _counts(conditions: MachineConditions) -> dict[str, str]:
    return {name: f"{value:,} times" for name, value in conditions.throttle_counts}
