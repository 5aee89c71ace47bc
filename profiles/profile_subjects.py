"""Everything that is measured of some subjects: in turns, in batches, under traffic, inside.

What can be compared takes turns in fresh processes (`take_turns`); the rest follows subject by
subject. Clocks, temperatures and other load are watched all the while.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeclip.profiles.layers.roofline import find_roofline
from edgeclip.profiles.layers.stages import layers_of, stages_of
from edgeclip.profiles.measure.cold_start import measure_cold_start
from edgeclip.profiles.measure.interleaved_benchmark import (
    measurements_of,
    sweep_subject,
    take_turns,
)
from edgeclip.profiles.measure.loadgen import import_loadgen, run_scenario
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec, example_feed
from edgeclip.profiles.record.measurement import (
    ColdStart,
    Identity,
    Measurement,
    MeasurementRun,
    ScenarioResult,
)
from edgeclip.profiles.sensors.energy import energy_or_reason
from edgeclip.profiles.sensors.interference import InterferenceWatch
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import EngineError, MissingExtraError

_ENERGY_SECONDS, _ENERGY_BLOCKS = 0.5, 10

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """What is to be measured.

    Attributes:
        specs: the subjects.
        device: of the roofline, and for the record.
        workload: how much.
        command: what was typed.
        reference: name of the subject that others of its part are divided by.
        inside: look at stages, layers and the machine's roofline, too.
    """

    specs: tuple[SubjectSpec, ...]
    device: DeviceProfile
    workload: Workload
    command: str
    reference: str | None = None
    inside: bool = True


def profile_subjects(plan: ProfilePlan, say: Say = lambda line: None) -> MeasurementRun:
    """Measure all subjects.

    Args:
        plan: what, and how much.
        say: told of each step in one line.

    Raises:
        EngineError: a subject cannot be opened or run.
        InputError: no subject, a name twice, or a picture that is missing.
    """
    workload = plan.workload
    with InterferenceWatch() as watch:
        say(f"{len(plan.specs)} subjects take turns in {workload.processes} processes")
        with progress_bar("turns") as progress:
            result = take_turns(plan.specs, workload, progress)
        found = measurements_of(result, plan.reference)
        measured = []
        for spec, item in zip(plan.specs, found, strict=True):
            say(f"{spec.title}: {', '.join(_steps(plan))}")
            measured.append(_more(plan, spec, item))
        roofline = None
        if plan.inside:
            say("what this machine can compute and move at most")
            roofline = find_roofline(plan.device, seconds=workload.roofline_seconds)
    return MeasurementRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=plan.command,
        workload=workload,
        machine=detect_machine(),
        measurements=tuple(measured),
        device=plan.device,
        before=watch.before,
        after=watch.after,
        interference=watch.found,
        yardstick=result.yardstick,
        roofline=roofline,
    )


def _steps(plan: ProfilePlan) -> list[str]:
    workload = plan.workload
    steps = {
        "sweep": len(workload.batch_sizes) > 1 or bool(workload.threads),
        "cold start": workload.cold_starts > 0,
        "scenarios": bool(workload.scenarios),
        "energy": True,
        "stages and layers": plan.inside,
    }
    return [name for name, wanted in steps.items() if wanted]


def _more(plan: ProfilePlan, spec: SubjectSpec, item: Measurement) -> Measurement:
    """Add to what turns said all that one subject tells by itself."""
    workload = plan.workload
    with progress_bar(spec.title) as progress:
        sweep = sweep_subject(
            spec, workload.batch_sizes, workload.threads, workload.seconds_per_batch, progress
        )
    missing = list(item.missing)
    with open_subject(spec) as opened:
        energy = energy_or_reason(
            spec.device, _once(opened), seconds=_ENERGY_SECONDS, blocks=_ENERGY_BLOCKS
        )
        scenarios = _scenarios(plan, opened, item.latency.p50_ms.value, missing)
    if isinstance(energy, str):
        missing.append(("energy", energy))
    start = _cold_start(spec, item.identity, workload.cold_starts)
    stages = stages_of(spec) if plan.inside else ()
    layers = layers_of(spec) if plan.inside else None
    for what, found in (("cold_start", start), ("stages", stages), ("layers", layers)):
        if isinstance(found, str):
            missing.append((what, found))
    return replace(
        item,
        sweep=sweep,
        cold_start=None if isinstance(start, str) else start,
        scenarios=scenarios,
        energy=None if isinstance(energy, str) else energy,
        stages=() if isinstance(stages, str) else stages,
        layers=None if isinstance(layers, str) else layers,
        missing=tuple(missing),
    )


def _once(opened: OpenSubject) -> Callable[[], object]:
    batch = opened.candidate.make_batch(1)
    return lambda: opened.candidate.run(batch)


def _scenarios(
    plan: ProfilePlan, opened: OpenSubject, single_ms: float, missing: list[tuple[str, str]]
) -> tuple[ScenarioResult, ...]:
    if not plan.workload.scenarios:
        return ()
    try:
        import_loadgen()
    except MissingExtraError as error:
        missing.append(("scenarios", str(error)))
        return ()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for scenario in plan.workload.scenarios:
            with progress_bar(scenario) as progress:
                found.append(
                    run_scenario(
                        scenario,
                        opened.candidate,
                        plan.workload,
                        single_ms=single_ms,
                        folder=Path(folder),
                        progress=progress,
                    )
                )
    return tuple(found)


def _cold_start(
    spec: SubjectSpec, found: Identity | None, processes: int
) -> ColdStart | str | None:
    """Time fresh processes that load a tower; None for what is more than one tower.

    A string says why it failed, as on TensorRT, whose engines are not loaded from a graph: all
    else that was measured must not be lost with it.
    """
    precision = None if found is None else found.precision
    if not processes or spec.bundle is None or precision is None:
        return None
    if spec.part not in ("image", "text"):
        return None
    bundle = Bundle.open(spec.bundle)
    feed: dict[str, Any] = example_feed(bundle, spec.part, precision)
    path = bundle.tower_path(spec.part, precision)
    try:
        return measure_cold_start(path, feed, device=spec.device, processes=processes)
    except EngineError as error:
        return str(error)


def names_of(specs: Sequence[SubjectSpec]) -> str:
    """The subjects in one line, for a person."""
    return ", ".join(spec.title for spec in specs)
