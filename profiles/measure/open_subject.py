"""A subject that is loaded, on its engine and with its inputs, and what it turned out to be."""

import functools
import io
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.profiles.measure.interleaved_runs import Candidate, repeat_rows
from edgeclip.profiles.measure.subject import SplitSpec, SubjectSpec
from edgeclip.profiles.record.measurement import Identity
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, sha256_file
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.ort_session import (
    GraphFacts,
    import_onnxruntime,
    precision_of,
    session_options,
)
from edgeclip.runtime.engines.providers import provider_of
from edgeclip.runtime.errors import EngineError, InputError, MissingExtraError, first_line
from edgeclip.runtime.inputs.images import load_picture
from edgeclip.runtime.planning.cut_set import WEIGHTS_NAME, CutSet, head_name
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.security import read_token
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.fallback import choose_precision
from edgeclip.runtime.towers.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile
    from edgeclip.runtime.split.http_client import Transfer
    from edgeclip.runtime.split.split_runtime import SplitRuntime

_WIDTH, _HEIGHT = 640, 480
_COUNT = 4
_QUALITY = 90
_CONTRAST = 50.0  # standard deviation of the levels
_COLOUR = 0.3  # of a channel's own part beside the brightness that all share


@functools.cache
def sample_pictures() -> tuple[bytes, ...]:
    """Four JPEG files of 640 x 480 pixels, always the same."""
    return tuple(map(_picture, range(_COUNT)))


def _picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    brightness = _noise(random)
    channels = [brightness + _COLOUR * _noise(random) for _ in range(3)]
    levels = np.clip(128 + _CONTRAST * np.stack(channels, axis=2), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _noise(random: np.random.Generator) -> NDArray[np.float64]:
    """Noise [height, width] of mean 0 and variance 1 whose amplitude is 1 over the frequency."""
    down = np.fft.fftfreq(_HEIGHT)[:, None]
    across = np.fft.rfftfreq(_WIDTH)
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    noise = np.fft.irfft2(phases / frequency, s=(_HEIGHT, _WIDTH))
    normed: NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return normed


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# For each message the fields to step into: ModelProto and so on down to the entry
# ("location", NAME) of a TensorProto's external_data.
_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_KEY, _VALUE = 1, 2
_MOST_BYTES = 10  # of a varint


def data_files(model: Path) -> tuple[Path, ...]:
    """The files beside an ONNX file that hold its weights, sorted; mostly none.

    Raises:
        InputError: the file cannot be read, or is no ONNX graph.
    """
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map_:
            names = set(_locations(map_, 0, len(map_), "model"))
    except (IndexError, UnicodeDecodeError):
        raise InputError(f"{model} is no ONNX graph, or not all of it") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"cannot read {model}: {error}") from None
    return tuple(sorted(model.parent / name for name in names))


def _locations(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[str]:
    for number, first, last in _fields(data, start, end):
        inner = _FIELDS[message].get(number)
        if inner == "entry":
            yield from _location(data, first, last)
        elif inner is not None:
            yield from _locations(data, first, last, inner)


def _location(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    entry = {number: data[first:last] for number, first, last in _fields(data, start, end)}
    if entry.get(_KEY) == b"location":
        yield entry[_VALUE].decode()


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a message that holds bytes."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > end:
                raise IndexError
            yield tag >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise IndexError
    if at > end:
        raise IndexError


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(_MOST_BYTES):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError


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
    from edgeclip.runtime.engines.tensorrt_library import open_library

    return open_library(runner.device).title


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


_PATIENCE_MS = 10_000.0  # for the first answer of all, whatever the plan's deadline
_ASKS_A_TOWER = ("image", "cut")


class SplitRun:
    """Embeds batches by a plan, and counts the answers that the device gave in its place."""

    def __init__(self, runtime: "SplitRuntime") -> None:
        self._runtime = runtime
        self._calls = 0
        self._degraded = Counter[str]()

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embed encoded pictures, object [N]; float32 [N, dim]."""
        reply = self._runtime.encode_image(list(batch))
        self._calls += 1
        if reply.degraded is not None:
            self._degraded[reply.degraded] += 1
        return reply.value

    def remarks(self) -> Remarks:
        """How often the server had no part in an answer although it should have."""
        if not self._degraded:
            return ()
        reasons = ", ".join(f"{count} by {why}" for why, count in self._degraded.most_common())
        total = self._degraded.total()
        return (("server", f"{total} of {self._calls} answers are the device's own: {reasons}"),)


def open_split(spec: SubjectSpec, bundle: Bundle) -> OpenSubject:
    """Load a bundle and connect to its server, which has to answer once.

    Raises:
        EngineError: the server does not answer.
        MissingExtraError: the extra "split" is not installed.
        InputError, ConfigError, CutSetError, SpaceMismatchError: see `SplitRuntime`.
    """
    assert spec.split is not None
    contents, shape = read_pictures(spec)
    with ExitStack() as stack:
        runtime = connect(spec, bundle, stack)
        _ask_once(runtime, contents[0], spec.split.server)
        identity = identity_of(spec, bundle, "image", runtime.encoder._image_tower, shape)
        run = SplitRun(runtime)
        return OpenSubject(
            candidate=Candidate(spec.title, run, repeat_rows(contents), spec.device.threads),
            identity=_with_server(identity, runtime.plan, spec.split),
            remarks=run.remarks,
            _resources=stack.pop_all(),
        )


def connect(
    spec: SubjectSpec,
    bundle: Bundle,
    stack: ExitStack,
    watch: "Callable[[Transfer], object]" = lambda transfer: None,
) -> "SplitRuntime":
    """Make the runtime of a split; `stack` closes it, and `watch` is told of every transfer.

    Raises:
        MissingExtraError, InputError, ConfigError, CutSetError, SpaceMismatchError: see
            `open_split`.
    """
    split = spec.split
    assert split is not None
    plan = SplitPlan.load(Path(split.plan))
    cuts = None if split.cuts is None else CutSet.open(split.cuts)
    encoder = ExactEncoder(bundle, spec.device, spec.precision)
    try:
        from edgeclip.runtime.split.http_client import Server
        from edgeclip.runtime.split.split_runtime import SplitRuntime
    except ImportError as error:
        if (error.name or "").startswith("edgeclip"):
            raise
        raise MissingExtraError(
            f"a split needs the package {error.name!r}: pip install 'edgeclip[split]'"
        ) from error
    server = None
    if split.server is not None:
        token = read_token(None if split.token_file is None else Path(split.token_file))
        server = stack.enter_context(
            Server(
                split.server, token=token, fingerprint=split.fingerprint, ca=split.ca, watch=watch
            )
        )
    return stack.enter_context(SplitRuntime(encoder, plan, server, cuts=cuts))


def _ask_once(runtime: "SplitRuntime", picture: bytes, server: str | None) -> None:
    """Make sure that the server answers; what is measured would be the device otherwise."""
    reply = runtime.encode_image(picture, deadline_ms=_PATIENCE_MS)
    if reply.degraded is not None:
        raise EngineError(
            f"the server at {server} gave no answer ({reply.degraded}): see that "
            f"`edgeclip serve` runs there with the model {runtime.plan.model!r}, and that token "
            "and certificate are right"
        )


def _with_server(identity: Identity, plan: SplitPlan, split: SplitSpec) -> Identity:
    """Add what the device stores for its part of a cut tower, and who computes the rest."""
    head = 0
    if split.cuts is not None and plan.cut:
        files = (Path(split.cuts, name) for name in (head_name(plan.cut), WEIGHTS_NAME))
        head = sum(file.stat().st_size for file in files if file.is_file())  # checked when opened
    provider = identity.provider
    if plan.kind in _ASKS_A_TOWER:
        provider += f" and {plan.model} at {split.server}"
    return replace(identity, bytes_on_disk=identity.bytes_on_disk + head, provider=provider)


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
        return open_model(spec)
    opened = bundle or Bundle.open(str(spec.bundle))
    if spec.part == "split":
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
