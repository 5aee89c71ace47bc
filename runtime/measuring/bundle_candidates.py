"""The towers of a bundle as candidates, what they are given, and measurements on record."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import detect_machine
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.measuring.interleave import Candidate, repeat_rows
from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tower_feed import tower_feed
from edgeclip.runtime.tower_runner import TowerRunner


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
            f"the bundle holds of the {tower} tower: export it anew for this device"
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
    return Candidate(
        name=prefix + precision,
        run=runner.run,
        make_batch=repeat_rows(inputs),
        threads=device.threads,
    )


def example_feed(bundle: Bundle, tower: Tower, precision: Precision) -> dict[str, NDArray[Any]]:
    """The first golden input as the graph of that precision takes it, in the batch it takes."""
    file = bundle.manifest.tower(tower).file(precision)
    rows = np.repeat(golden_inputs(bundle, tower)[:1], file.batch or 1, axis=0)
    return tower_feed(rows, tower, file.pixels, bundle.manifest.spec.image)
