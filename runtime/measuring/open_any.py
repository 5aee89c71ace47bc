"""Open any subject of a profile."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import choose_precision
from edgeclip.runtime.measuring.interleave import Candidate, repeat_rows
from edgeclip.runtime.measuring.open_subject import (
    ExactEncoder,
    OpenSubject,
    identity_of,
    read_pictures,
)
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.tower_runner import TowerRunner


def open_subject(spec: SubjectSpec, *, bundle: Bundle | None = None) -> OpenSubject:
    """Load a subject.

    Args:
        spec: which one.
        bundle: that of the spec, where it is open already; checking a bundle reads all of it.

    Raises:
        BundleError: not a bundle, or it does not hold the precision.
        InputError: the device does not allow the precision, or a picture or model that is
            missing or cannot be read.
        EngineError: it cannot be loaded, computes wrongly, or its server does not answer.
        MissingExtraError: a package is not installed.
        ConfigError, CutSetError, SpaceMismatchError: see `SplitRuntime`.
    """
    if spec.model is not None:
        from edgeclip.runtime.measuring.open_model import open_model

        return open_model(spec)
    opened = bundle or Bundle.open(str(spec.bundle))
    if spec.part == "split":
        from edgeclip.runtime.measuring.open_split import open_split

        return open_split(spec, opened)
    if spec.part == "file":
        return _open_file(spec, opened)
    return _open_tower(spec, opened, spec.part)


def _open_tower(spec: SubjectSpec, bundle: Bundle, tower: Tower) -> OpenSubject:
    precision = choose_precision(bundle.manifest.tower(tower), spec.device, spec.precision)
    runner = TowerRunner(bundle, tower, precision, spec.device)
    inputs = bundle.golden().inputs(tower)
    return OpenSubject(
        candidate=Candidate(spec.title, runner.run, repeat_rows(inputs), spec.device.threads),
        identity=identity_of(spec, bundle, tower, runner, inputs[:1].shape),
    )


def _open_file(spec: SubjectSpec, bundle: Bundle) -> OpenSubject:
    encoder = ExactEncoder(bundle, spec.device, spec.precision)
    contents, shape = read_pictures(spec)
    encoder.encode_image(list(contents[:1]))  # loads the tower

    def run(batch: NDArray[Any]) -> NDArray[np.float32]:
        return encoder.encode_image(list(batch), batch_size=len(batch))

    return OpenSubject(
        candidate=Candidate(spec.title, run, repeat_rows(contents), spec.device.threads),
        identity=identity_of(spec, bundle, "image", encoder._image_tower, shape),
    )
