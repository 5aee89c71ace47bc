"""Subjects of a profile as data: a tower, a bundle with or without a server, or a peer's graph.

A SubjectSpec is JSON-serializable, so that a worker process can be told what to open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.record.measurement import Part
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import choose_precision, tower_feed, usable_precisions

_TOWERS = ("image", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """Plan and server of a subject that is split between device and server.

    Attributes:
        plan: JSON file of a `SplitPlan`.
        server: URL of the server; None for a plan that runs on the device alone.
        cuts: directory that `edgeclip cut` wrote, for a plan of kind "cut".
        token_file: file with the bearer token; by default $EDGECLIP_TOKEN is used.
        fingerprint: SHA-256 of the only server certificate to trust.
        ca: PEM file of certificates to trust in place of the system's.
    """

    plan: str
    server: str | None = None
    cuts: str | None = None
    token_file: str | None = None
    fingerprint: str | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectSpec:
    """One subject to measure.

    Attributes:
        name: unique among the subjects of the same part.
        part: the part of a bundle that runs.
        device: engine, threads and batches.
        bundle: its directory; None for a peer.
        model: ONNX file of a peer: somebody else's image or text tower, run unchanged in ONNX
            Runtime.
        precision: precision of the bundle's tower; by default the bundle's choice for the device.
        pictures: image files of the parts "file" and "split"; the first one runs at batch 1. By
            default generated ones with the statistics of photos.
        split: required for the part "split", and only there.
        axes: (name, size) of each dynamic axis of a peer's inputs, except the batch axis.

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
        """Part and name, unique among all subjects of a profile."""
        return f"{self.part} {self.name}"

    @property
    def needs_pictures(self) -> bool:
        """Whether its inputs are image files."""
        return self.part in ("file", "split")


def bundle_parts(bundle: Bundle) -> tuple[Part, ...]:
    """List the parts of a bundle that run without a server."""
    return ("image", "text", "file") if bundle.manifest.has("text") else ("image", "file")


def bundle_subjects(
    bundle: Bundle,
    device: DeviceProfile,
    parts: Sequence[Part] | None = None,
    pictures: Sequence[str | Path] = (),
    *,
    split: SplitSpec | None = None,
) -> tuple[SubjectSpec, ...]:
    """List all subjects of a bundle on a device, part by part.

    A tower is listed in each precision that the device can run, named by the precision; "file"
    in the precision that an `Encoder` would choose; "split" is named by its plan.

    Args:
        bundle: an opened bundle.
        device: engine, threads and precisions.
        parts: by default all of `bundle_parts`.
        pictures: image files for "file" and "split", see `SubjectSpec`.
        split: plan and server for the part "split".

    Raises:
        InputError: the device can run none of the precisions, or the part "split" without a plan.
        BundleError: the bundle has no text tower, see also `choose_precision`.
        ConfigError: the plan cannot be read.
    """
    root, files = str(bundle.path), tuple(map(str, pictures))
    found: list[SubjectSpec] = []
    for part in bundle_parts(bundle) if parts is None else parts:
        if part == "image" or part == "text":
            found += [
                SubjectSpec(name=each, part=part, device=device, bundle=root, precision=each)
                for each in measurable_precisions(bundle, part, device)
            ]
            continue
        precision = choose_precision(bundle.manifest.tower("image"), device)
        name: str = precision
        if part == "split":
            if split is None:
                raise InputError("the part 'split' needs a plan: make one with `edgeclip plan`")
            name = SplitPlan.load(Path(split.plan)).name
        found.append(
            SubjectSpec(
                name=name,
                part=part,
                device=device,
                bundle=root,
                precision=precision,
                pictures=files,
                split=split if part == "split" else None,
            )
        )
    return tuple(found)


def measurable_precisions(
    bundle: Bundle, tower: Tower, device: DeviceProfile
) -> tuple[Precision, ...]:
    """List the bundle's precisions of `tower` that the device can run, in the bundle's order.

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


def example_feed(bundle: Bundle, tower: Tower, precision: Precision) -> dict[str, NDArray[Any]]:
    """Make inputs for a tower's graph from the first golden input, in the graph's batch size."""
    file = bundle.manifest.tower(tower).file(precision)
    rows = np.repeat(bundle.golden().inputs(tower)[:1], file.batch or 1, axis=0)
    return tower_feed(rows, tower, file.pixels, bundle.manifest.spec.image)
