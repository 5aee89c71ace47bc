"""Profile subjects: latency, throughput, cold start, MLPerf scenarios, energy, stages and layers.

Latencies at batch 1 come from interleaved runs of all subjects in fresh processes; the rest is
measured subject by subject. Clocks, temperatures and other load are recorded all the while.
"""

import logging
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from edgeclip.profiles.layers.roofline import measure_roofline
from edgeclip.profiles.layers.stages import profile_stages, profile_tower_layers
from edgeclip.profiles.measure.cold_start import measure_cold_start
from edgeclip.profiles.measure.interleaved_benchmark import (
    run_interleaved_benchmark,
    sweep_subject,
    to_measurements,
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

_log = logging.getLogger(__name__)

_ENERGY_SECONDS, _ENERGY_BLOCKS = 0.5, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """What to measure.

    Attributes:
        specs: the subjects.
        device: the device; decides the roofline, and is recorded.
        workload: batch sizes, repeats, processes and scenarios.
        command: the command line that the user typed.
        reference: name of the subject that others of the same part are divided by.
        inside: also measure stages, layers and the machine's roofline.
    """

    specs: tuple[SubjectSpec, ...]
    device: DeviceProfile
    workload: Workload
    command: str
    reference: str | None = None
    inside: bool = True


def profile_subjects(plan: ProfilePlan) -> MeasurementRun:
    """Measure all subjects of a plan; log each step.

    Raises:
        EngineError: a subject cannot be opened or run.
        InputError: no subject, a repeated name, or a missing picture.
    """
    workload = plan.workload
    with InterferenceWatch() as watch:
        _log.info("%d subjects, interleaved, in %d processes", len(plan.specs), workload.processes)
        with progress_bar("interleaved runs") as progress:
            result = run_interleaved_benchmark(plan.specs, workload, progress)
        measured = []
        interleaved = to_measurements(result, plan.reference)
        for spec, item in zip(plan.specs, interleaved, strict=True):
            _log.info("%s: %s", spec.title, ", ".join(_step_names(plan)))
            measured.append(_complete(plan, spec, item))
        roofline = None
        if plan.inside:
            _log.info("peak compute and memory bandwidth of this machine")
            roofline = measure_roofline(plan.device, seconds=workload.roofline_seconds)
    return MeasurementRun(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
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


def _step_names(plan: ProfilePlan) -> list[str]:
    workload = plan.workload
    steps = {
        "sweep": len(workload.batch_sizes) > 1 or bool(workload.threads),
        "cold start": workload.cold_starts > 0,
        "scenarios": bool(workload.scenarios),
        "energy": True,
        "stages and layers": plan.inside,
    }
    return [name for name, wanted in steps.items() if wanted]


def _complete(plan: ProfilePlan, spec: SubjectSpec, item: Measurement) -> Measurement:
    """Add to a measurement all that is measured of the subject alone."""
    workload = plan.workload
    with progress_bar(spec.title) as progress:
        sweep = sweep_subject(
            spec, workload.batch_sizes, workload.threads, workload.seconds_per_batch, progress
        )
    missing = list(item.missing)
    with open_subject(spec) as opened:
        batch = opened.target.make_batch(1)
        energy = energy_or_reason(
            spec.device,
            lambda: opened.target.run(batch),
            seconds=_ENERGY_SECONDS,
            blocks=_ENERGY_BLOCKS,
        )
        scenarios = _run_scenarios(plan, opened, item.latency.p50_ms.value, missing)
    start = _cold_start(spec, item.identity, workload.cold_starts)
    stages = profile_stages(spec) if plan.inside else ()
    layers = profile_tower_layers(spec) if plan.inside else None
    for what, found in (
        ("energy", energy),
        ("cold_start", start),
        ("stages", stages),
        ("layers", layers),
    ):
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


def _run_scenarios(
    plan: ProfilePlan, opened: OpenSubject, single_ms: float, missing: list[tuple[str, str]]
) -> tuple[ScenarioResult, ...]:
    """Run the workload's scenarios; without LoadGen, add the reason to `missing`."""
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
                        opened.target,
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
    """Measure the cold start of a bundle's tower; None for other subjects.

    Returns the reason as a string if it fails, as with TensorRT, whose engines are not loaded
    from a graph: the other results must not be lost with it.
    """
    precision = None if found is None else found.precision
    if not processes or spec.bundle is None or precision is None:
        return None
    if spec.part not in ("image", "text"):
        return None
    bundle = Bundle.open(spec.bundle)
    feed = example_feed(bundle, spec.part, precision)
    path = bundle.tower_path(spec.part, precision)
    try:
        return measure_cold_start(path, feed, device=spec.device, processes=processes)
    except EngineError as error:
        return str(error)
