"""Measure both towers of a bundle in every precision that the device allows."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from numpy.typing import NDArray

from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import detect_machine
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.measuring.cold_start import measure_cold_start
from edgeclip.runtime.measuring.interleave import Candidate, measure_interleaved, repeat_rows
from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun
from edgeclip.runtime.progress import progress_bar
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tower_feed import tower_feed
from edgeclip.runtime.tower_runner import TowerRunner


def measure_bundle(
    bundle: Bundle,
    *,
    device: DeviceProfile,
    workload: Workload,
    command: str,
) -> MeasurementRun:
    """Measure latency, throughput and cold start of every tower and precision.

    Ratios are to the tower's fp32, where the bundle holds it and the device allows it.

    Args:
        bundle: its golden inputs are what runs.
        device: says which engine to use and which precisions to measure.
        workload: how much to measure.
        command: what the user typed, for the record.

    Raises:
        InputError: the device allows none of the bundle's precisions.
        EngineError: a tower cannot be loaded or run.
    """
    results: list[Measurement] = []
    for tower in get_args(Tower):
        candidates = bundle_candidates(bundle, tower, device)
        names = [candidate.name for candidate in candidates]
        with progress_bar(f"{tower} tower") as progress:
            measured = measure_interleaved(
                candidates,
                workload,
                part=tower,
                reference="fp32" if "fp32" in names else None,
                progress=progress,
            )
        if workload.cold_starts:
            precisions = measurable_precisions(bundle, tower, device)
            measured = tuple(
                _with_cold_start(item, precision, bundle, device, workload.cold_starts)
                for item, precision in zip(measured, precisions, strict=True)
            )
        results += measured
    return measurement_run(results, workload=workload, command=command)


def measurement_run(
    measurements: Sequence[Measurement], *, workload: Workload, command: str
) -> MeasurementRun:
    """Put measurements on record, with this machine and the time."""
    return MeasurementRun(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        workload=workload,
        machine=detect_machine(),
        measurements=tuple(measurements),
    )


def bundle_candidates(
    bundle: Bundle, tower: Tower, device: DeviceProfile, *, prefix: str = ""
) -> tuple[Candidate, ...]:
    """One candidate for each precision of `tower` that the device allows, in its order.

    Their inputs are the bundle's golden ones, repeated to fill a batch. Each is named
    `prefix` and its precision.

    Raises:
        InputError: the device allows none of them.
    """
    inputs = golden_inputs(bundle, tower)
    return tuple(
        _candidate(bundle, tower, precision, device, inputs, prefix)
        for precision in measurable_precisions(bundle, tower, device)
    )


def measurable_precisions(
    bundle: Bundle, tower: Tower, device: DeviceProfile
) -> tuple[Precision, ...]:
    """The bundle's precisions of `tower` that the device can run, in its order.

    Raises:
        InputError: there are none.
    """
    manifest = bundle.manifest.tower(tower)
    usable = usable_precisions(manifest, device)
    if not usable:
        raise InputError(
            f"device {device.name!r} can run none of {', '.join(manifest.precisions)}, which "
            f"the bundle holds of the {tower} tower"
        )
    return tuple(precision for precision in manifest.precisions if precision in usable)


def golden_inputs(bundle: Bundle, tower: Tower) -> NDArray[Any]:
    """The golden inputs of a tower: uint8 [N, size, size, 3] or token ids int64 [M, length]."""
    return bundle.golden().inputs(tower)


def _candidate(
    bundle: Bundle,
    tower: Tower,
    precision: Precision,
    device: DeviceProfile,
    inputs: NDArray[Any],
    prefix: str,
) -> Candidate:
    runner = TowerRunner(bundle, tower, precision, device)
    return Candidate(name=prefix + precision, run=runner.run, make_batch=repeat_rows(inputs))


def _with_cold_start(
    item: Measurement, precision: Precision, bundle: Bundle, device: DeviceProfile, processes: int
) -> Measurement:
    start = measure_cold_start(
        bundle.tower_path(item.tower, precision),
        example_feed(bundle, item.tower, precision),
        device=device,
        processes=processes,
    )
    return dataclasses.replace(item, cold_start=start)


def example_feed(bundle: Bundle, tower: Tower, precision: Precision) -> dict[str, NDArray[Any]]:
    """The first golden input as the graph of that precision takes it."""
    first = golden_inputs(bundle, tower)[:1]
    pixels = bundle.manifest.tower(tower).file(precision).pixels
    return tower_feed(first, tower, pixels, bundle.manifest.spec.image)
