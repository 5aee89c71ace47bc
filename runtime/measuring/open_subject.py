"""A subject that is loaded, on its engine and with its inputs, and what it turned out to be."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.bundle_paths import MANIFEST_NAME
from edgeclip.runtime.choose_precision import choose_precision
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engine_ort import OrtEngine
from edgeclip.runtime.files import sha256_file
from edgeclip.runtime.load_image import load_picture
from edgeclip.runtime.measuring.interleave import Candidate
from edgeclip.runtime.measuring.measurement import Identity
from edgeclip.runtime.measuring.sample_pictures import sample_pictures
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile

Remarks = tuple[tuple[str, str], ...]


def _no_remarks() -> Remarks:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenSubject:
    """A subject that can run. Close it, or use it as a context manager.

    Attributes:
        candidate: what runs; its inputs are the bundle's golden ones, or pictures.
        identity: what it is of.
        remarks: what has to be known of its runs so far, as `Measurement.missing` keeps it.
    """

    candidate: Candidate
    identity: Identity
    remarks: Callable[[], Remarks] = _no_remarks
    _resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Close what it opened, such as connections; it cannot run any more."""
        self._resources.close()

    def __enter__(self) -> "OpenSubject":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ExactEncoder(Encoder):
    """An encoder whose image tower runs in one precision, with nothing in its place.

    `Encoder` takes something more exact where an engine computes wrongly; what is measured must
    be what it is called.

    Args:
        bundle: an opened bundle.
        device: what may run here, and how.
        precision: of the image tower; what `Encoder` would take by default.
    """

    def __init__(
        self, bundle: Bundle, device: "DeviceProfile", precision: Precision | None
    ) -> None:
        super().__init__(bundle, device)
        tower = bundle.manifest.tower("image")
        self.precisions["image"] = choose_precision(tower, device, precision)
        self._is_wanted = True


def identity_of(
    spec: SubjectSpec,
    bundle: Bundle,
    tower: Tower,
    runner: TowerRunner,
    input_shape: Sequence[int],
) -> Identity:
    """What a tower of a bundle is; `runner` is what runs it."""
    file = bundle.manifest.tower(tower).file(runner.precision)
    sizes = {item.path: item.bytes for item in bundle.manifest.files}
    weights = 0 if file.data_path is None else sizes[file.data_path]
    return Identity(
        bundle=bundle.manifest.name,
        sha256=sha256_file(bundle.path / MANIFEST_NAME),
        precision=runner.precision,
        engine=spec.device.engine,
        provider=_provider_of(runner),
        threads=spec.device.threads,
        bytes_on_disk=sizes[file.path] + weights,
        input_shape=tuple(input_shape),
    )


def read_pictures(spec: SubjectSpec) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
    """The encoded pictures of a subject, object [N], and the shape of the first one's pixels.

    Raises:
        InputError: a file that is missing, or no picture.
    """
    paths = tuple(map(Path, spec.pictures))
    whole = [load_picture(path).full_size for path in paths]  # says which one is damaged
    read = [path.read_bytes() for path in paths] or sample_pictures()
    contents = np.empty(len(read), dtype=object)
    contents[:] = read
    width, height = whole[0] if whole else load_picture(read[0]).full_size
    return contents, (1, height, width, 3)


def _provider_of(runner: TowerRunner) -> str:
    """What computes, as the session tells; all that may, where the device lets others help out."""
    engine = runner._engine
    if isinstance(engine, OrtEngine):
        used = list(map(str, engine._session.get_providers()))
        return ", ".join(used if runner.device.cpu_fallback else used[:1])
    from edgeclip.runtime.tensorrt_library import open_library

    return open_library(runner.device).title
