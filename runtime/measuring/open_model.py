"""An ONNX file of somebody else as a subject: a plain ONNX Runtime session and made-up inputs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError, InputError, first_line
from edgeclip.runtime.files import sha256_file
from edgeclip.runtime.graph_facts import GraphFacts, precision_of
from edgeclip.runtime.measuring.interleave import Candidate
from edgeclip.runtime.measuring.measurement import Identity
from edgeclip.runtime.measuring.onnx_data import data_files
from edgeclip.runtime.measuring.open_subject import OpenSubject
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.ort_session import import_onnxruntime, session_options
from edgeclip.runtime.providers import provider_of

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile

Values = NDArray[Any]

_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True, slots=True)
class ModelInput:
    """An input of a graph; in its shape None is the batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def values(self, size: int) -> Values:
        """Values for a batch: noise for floats and pixels, ones for what may be an index."""
        shape = [size if side is None else side for side in self.shape]
        random = np.random.default_rng(0)
        if self.dtype.kind == "f":
            return random.standard_normal(shape).astype(self.dtype)
        if self.dtype == np.uint8:
            return random.integers(0, 256, shape, dtype=np.uint8)
        return np.ones(shape, self.dtype)


class Model:
    """A graph in a session of its own.

    The batch is the first axis of each input whose first axis varies. A graph without any takes
    the batch that its first input has.

    Raises:
        EngineError: ONNX Runtime cannot load it on the device's provider.
        InputError: an input that cannot be made up.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: "DeviceProfile", axes: dict[str, int]) -> None:
        self._path = path
        self._session = _session(path, device)
        self._inputs = [_input(path, item, axes) for item in self._session.get_inputs()]
        if not self._inputs:
            raise InputError(f"{path} has no inputs: there is nothing to measure")
        varying = [item for item in self._inputs if item.shape[:1] == (None,)]
        self._first = (varying or self._inputs)[0]
        self._rest: dict[int, dict[str, Values]] = {}

    @property
    def provider(self) -> str:
        """What computes, as the session tells."""
        return str(self._session.get_providers()[0])

    def batch(self, size: int) -> Values:
        """The first input for a batch.

        Raises:
            InputError: the graph takes another batch only.
        """
        values = self._first.values(size)
        if values.shape[:1] != (size,):
            only = values.shape[0] if values.ndim else "no"
            raise InputError(f"{self._path} takes batches of {only} only, not of {size}")
        return values

    def run(self, batch: Values) -> object:
        """Run the graph once.

        Raises:
            EngineError: it failed.
        """
        size = len(batch)
        if size not in self._rest:
            others = (item for item in self._inputs if item is not self._first)
            self._rest[size] = {item.name: item.values(size) for item in others}
        try:
            return self._session.run(None, {self._first.name: batch, **self._rest[size]})
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"{self._path} failed: {first_line(error)}") from error


def open_model(spec: SubjectSpec) -> OpenSubject:
    """Load somebody else's ONNX file, with the device's provider and threads.

    Raises:
        InputError: it is missing, or has an input that cannot be made up.
        EngineError, MissingExtraError: see `Model`.
    """
    path = Path(str(spec.model))
    if not path.is_file():
        raise InputError(f"model {path} does not exist: check the path")
    model = Model(path, spec.device, dict(spec.axes))
    files = (path, *data_files(path))
    identity = Identity(
        bundle=path.name,
        sha256=sha256_file(path),
        precision=None,
        engine=spec.device.engine,
        provider=model.provider,
        threads=spec.device.threads,
        bytes_on_disk=sum(file.stat().st_size for file in files),
        input_shape=model.batch(1).shape,
    )
    candidate = Candidate(spec.title, model.run, model.batch, spec.device.threads)
    return OpenSubject(candidate=candidate, identity=identity)


def _session(path: Path, device: "DeviceProfile") -> Any:
    ort, provider = import_onnxruntime(), provider_of(device)
    available = ort.get_available_providers()
    if provider.name not in available:
        raise EngineError(
            f"this onnxruntime has no {provider.name} (it has {', '.join(available)}): install "
            f"{provider.package}"
        )
    chain = [(provider.name, provider.options(device, GraphFacts(precision=precision_of(path))))]
    options = session_options(ort, device.threads)
    try:
        session = ort.InferenceSession(str(path), options, providers=chain, enable_fallback=0)
    except Exception as error:  # as in `Model.run`
        raise EngineError(f"cannot load {path}: {first_line(error)}") from error
    used = session.get_providers()[0]
    if used != provider.name:
        raise EngineError(f"{path}: ONNX Runtime took {used} in place of {provider.name}")
    return session


def _input(path: Path, item: Any, axes: dict[str, int]) -> ModelInput:
    if item.type not in _DTYPES:
        raise InputError(f"{path} has an input {item.name!r} of {item.type}, which is not made up")
    shape: list[int | None] = []
    for place, side in enumerate(item.shape):
        if isinstance(side, int):
            shape.append(side)
        else:
            shape.append(None if place == 0 else _size(path, item.name, side, place, axes))
    if math.prod(side for side in shape if side is not None) < 1:
        raise InputError(f"{path} has an input {item.name!r} of shape {item.shape}: nothing to run")
    return ModelInput(item.name, np.dtype(_DTYPES[item.type]), tuple(shape))


def _size(path: Path, given: str, side: str | None, place: int, axes: dict[str, int]) -> int:
    """How long a varying axis is to be; one without a name is called INPUT.PLACE."""
    name = side or f"{given}.{place}"
    if name not in axes:
        raise InputError(
            f"{path} leaves open how long the axis {name!r} of its input {given!r} is: say so with "
            f"--peer-axis {name}=SIZE"
        )
    return axes[name]
