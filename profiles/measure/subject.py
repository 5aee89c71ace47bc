"""Subjects of a profile: towers of a bundle, an ONNX file, or a bundle with a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import Candidate, repeat_rows
from edgeclip.profiles.record.measurement import Measurement, MeasurementRun, Part
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.fallback import usable_precisions
from edgeclip.runtime.towers.tower_runner import TowerRunner, tower_feed


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


_TOWERS = ("image", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """Whose help a bundle has.

    Attributes:
        plan: JSON file of a `SplitPlan`.
        server: its address; not needed for a plan that asks nobody.
        cuts: directory that `edgeclip cut` wrote, for a plan of kind "cut".
        token_file: holds the bearer token; by default $EDGECLIP_TOKEN is it.
        fingerprint: SHA-256 of the server's certificate, the only one to trust.
        ca: file of certificates (PEM) to trust in place of the system's.
    """

    plan: str
    server: str | None = None
    cuts: str | None = None
    token_file: str | None = None
    fingerprint: str | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectSpec:
    """One subject, as data: a fresh process can be told what to open.

    Attributes:
        name: unique among the subjects of the same part.
        part: what is run.
        device: engine, threads and batches.
        bundle: its directory; None for a graph of somebody else.
        model: ONNX file of somebody else's image or text tower, given to ONNX Runtime as it is.
        precision: of a bundle's tower; what the bundle chose by default.
        pictures: image files of "file" and "split", the first of which runs at batch 1; some
            that look like photos by default.
        split: for "split" alone.
        axes: (name, size) of each varying axis that a model has beside the batch, which is what
            is asked for.

    Raises:
        ValueError: fields that contradict each other; all of them in one message.
    """

    name: str
    part: Part
    device: DeviceProfile
    bundle: str | None = None
    model: str | None = None
    precision: Precision | None = None
    pictures: tuple[str, ...] = ()
    split: SplitSpec | None = None
    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        mistakes = []
        if not self.name.strip():
            mistakes.append("name must not be empty")
        if (self.bundle is None) is (self.model is None):
            mistakes.append("a subject is of a bundle or of a model: give one of them")
        if self.model is not None and (self.part not in _TOWERS or self.precision is not None):
            mistakes.append("a model is an image or a text tower, and has no precision to choose")
        if (self.split is None) is (self.part == "split"):
            mistakes.append("split is for the part 'split', and needed there")
        if self.pictures and self.part in _TOWERS:
            mistakes.append("pictures are for the parts 'file' and 'split'")
        if self.axes and self.model is None:
            mistakes.append("axes are for a model")
        if mistakes:
            raise ValueError("; ".join(mistakes))

    @property
    def title(self) -> str:
        """What it is called where subjects of several parts meet."""
        return f"{self.part} {self.name}"

    @property
    def needs_pictures(self) -> bool:
        """Whether it begins with image files."""
        return self.part in ("file", "split")


def parts_of(bundle: "Bundle") -> tuple[Part, ...]:
    """What of a bundle runs without a server: its towers, and the way from a file."""
    return ("image", "text", "file") if bundle.manifest.has("text") else ("image", "file")


def subjects_of(
    bundle: "Bundle",
    device: DeviceProfile,
    parts: Sequence[Part] | None = None,
    pictures: Sequence[str | Path] = (),
    *,
    split: SplitSpec | None = None,
) -> tuple[SubjectSpec, ...]:
    """All subjects of a bundle on a device, part by part.

    A tower is there in each precision that the device can run, and bears its name; the way from
    a file to its embedding in the precision that an `Encoder` takes; a split by its plan's name.

    Args:
        bundle: an opened bundle.
        device: engine, threads and precisions.
        parts: which ones; by default all of `parts_of`.
        pictures: see `SubjectSpec`.
        split: for the part "split".

    Raises:
        InputError: the device can run none of the precisions, or "split" is asked for without
            saying whose help.
        BundleError: see `choose_precision`; or a text tower is asked for that is not there.
        ConfigError: the plan cannot be read.
    """
    # With numpy and Pillow, which whoever reads a spec does not need.
    from edgeclip.runtime.towers.fallback import choose_precision

    root, files = str(bundle.path), tuple(map(str, pictures))
    found: list[SubjectSpec] = []
    for part in parts_of(bundle) if parts is None else parts:
        if part == "image" or part == "text":
            found += [
                SubjectSpec(name=each, part=part, device=device, bundle=root, precision=each)
                for each in measurable_precisions(bundle, part, device)
            ]
            continue
        chosen = choose_precision(bundle.manifest.tower("image"), device)
        found.append(
            SubjectSpec(
                name=chosen if part == "file" else _plan_name(split),
                part=part,
                device=device,
                bundle=root,
                precision=chosen,
                pictures=files,
                split=split if part == "split" else None,
            )
        )
    return tuple(found)


def _plan_name(split: SplitSpec | None) -> str:
    from edgeclip.runtime.planning.plan import SplitPlan

    if split is None:
        raise InputError("the part 'split' needs a plan: make one with `edgeclip plan`")
    return SplitPlan.load(Path(split.plan)).name
