"""Open a subject: load its model on its engine, make its inputs, and connect to its server."""

import functools
import io
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, repeat_rows
from edgeclip.profiles.measure.onnx_model import OnnxModel, data_files
from edgeclip.profiles.measure.subject import SplitSpec, SubjectSpec, measurable_precisions
from edgeclip.profiles.record.measurement import Identity
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.errors import EngineError, InputError, MissingExtraError
from edgeclip.runtime.inputs.images import decode_image
from edgeclip.runtime.planning.cut_set import WEIGHTS_NAME, CutSet, head_file_name
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.security import read_token
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import TowerRunner, choose_precision

if TYPE_CHECKING:
    from edgeclip.runtime.split.http_client import Transfer
    from edgeclip.runtime.split.split_runtime import SplitRuntime

Remarks = tuple[tuple[str, str], ...]

_FIRST_REPLY_MS = 10_000.0  # deadline of the first request of all, whatever the plan's deadline
_KINDS_WITH_REMOTE_TOWER = ("image", "cut")  # of a SplitPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenSubject:
    """A loaded subject. Close it, or use it as a context manager.

    Attributes:
        target: runs the subject; its inputs are the bundle's golden ones, pictures, or generated.
        identity: the exact model and engine.
        remarks: returns (name, text) of problems in the runs so far, for `Measurement.missing`.
    """

    target: BenchmarkTarget
    identity: Identity
    remarks: Callable[[], Remarks] = tuple
    _resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Close connections; the subject cannot run any more."""
        self._resources.close()

    def __enter__(self) -> "OpenSubject":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_subject(spec: SubjectSpec, *, bundle: Bundle | None = None) -> OpenSubject:
    """Load a subject.

    Args:
        spec: the subject.
        bundle: the bundle of `spec`, if it is open already; checking a bundle reads all of it.

    Raises:
        BundleError: not a bundle, or it does not hold the precision.
        InputError: the device does not allow the precision, or a picture or model is missing or
            cannot be read.
        EngineError: it cannot be loaded, computes wrong results, or its server does not reply.
        MissingExtraError: a package is not installed.
        ConfigError, CutSetError, SpaceMismatchError: see `SplitRuntime`.
    """
    if spec.model is not None:
        return _open_peer(spec, Path(spec.model))
    opened = bundle or Bundle.open(str(spec.bundle))
    if spec.part == "split":
        return _open_split(spec, opened)
    if spec.part == "file":
        return _open_file(spec, opened)
    return _open_tower(spec, opened, spec.part)


def bundle_targets(
    bundle: Bundle, tower: Tower, device: DeviceProfile, *, prefix: str = ""
) -> tuple[BenchmarkTarget, ...]:
    """Load a tower in each precision that the device can run, with the golden inputs.

    Each target is named by `prefix` and its precision.

    Raises:
        InputError: the device can run none of them.
    """
    inputs = bundle.golden().inputs(tower)
    return tuple(
        BenchmarkTarget(
            name=prefix + precision,
            run=TowerRunner(bundle, tower, precision, device).run,
            make_batch=repeat_rows(inputs),
            threads=device.threads,
        )
        for precision in measurable_precisions(bundle, tower, device)
    )


def _open_tower(spec: SubjectSpec, bundle: Bundle, tower: Tower) -> OpenSubject:
    precision = choose_precision(bundle.manifest.tower(tower), spec.device, spec.precision)
    runner = TowerRunner(bundle, tower, precision, spec.device)
    inputs = bundle.golden().inputs(tower)
    return OpenSubject(
        target=BenchmarkTarget(spec.title, runner.run, repeat_rows(inputs), spec.device.threads),
        identity=_identity(spec, bundle, tower, runner, inputs[:1].shape),
    )


def _open_file(spec: SubjectSpec, bundle: Bundle) -> OpenSubject:
    """Load an encoder that decodes, preprocesses and embeds image files."""
    encoder = FixedPrecisionEncoder(bundle, spec.device, spec.precision)
    contents, shape = _read_pictures(spec)
    encoder.encode_image(list(contents[:1]))  # loads the tower

    def run(batch: NDArray[Any]) -> FloatArray:
        return encoder.encode_image(list(batch), batch_size=len(batch))

    return OpenSubject(
        target=BenchmarkTarget(spec.title, run, repeat_rows(contents), spec.device.threads),
        identity=_identity(spec, bundle, "image", encoder._image_tower, shape),
    )


def _open_peer(spec: SubjectSpec, path: Path) -> OpenSubject:
    """Load somebody else's ONNX file with the device's provider and threads."""
    if not path.is_file():
        raise InputError(f"model {path} does not exist: check the path")
    model = OnnxModel(path, spec.device, dict(spec.axes))
    identity = Identity(
        bundle=path.name,
        sha256=sha256_file(path),
        precision=None,
        engine=spec.device.engine,
        provider=model.provider,
        threads=spec.device.threads,
        bytes_on_disk=sum(file.stat().st_size for file in (path, *data_files(path))),
        input_shape=model.make_batch(1).shape,
    )
    target = BenchmarkTarget(spec.title, model.run, model.make_batch, spec.device.threads)
    return OpenSubject(target=target, identity=identity)


def _open_split(spec: SubjectSpec, bundle: Bundle) -> OpenSubject:
    """Load a bundle and connect to its server, which must reply once."""
    assert spec.split is not None
    contents, shape = _read_pictures(spec)
    with ExitStack() as stack:
        runtime = connect_split(spec, bundle, stack)
        # Without this check the device itself would be measured if the server is unreachable.
        reply = runtime.encode_image(contents[0], deadline_ms=_FIRST_REPLY_MS)
        if reply.degraded is not None:
            raise EngineError(
                f"the server at {spec.split.server} gave no answer ({reply.degraded}): see that "
                f"`edgeclip serve` runs there with the model {runtime.plan.model!r}, and that "
                "token and certificate are right"
            )
        identity = _identity(spec, bundle, "image", runtime.encoder._image_tower, shape)
        run = _SplitRun(runtime)
        return OpenSubject(
            target=BenchmarkTarget(spec.title, run, repeat_rows(contents), spec.device.threads),
            identity=_with_server(identity, runtime.plan, spec.split),
            remarks=run.remarks,
            _resources=stack.pop_all(),
        )


def connect_split(
    spec: SubjectSpec,
    bundle: Bundle,
    stack: ExitStack,
    watch: "Callable[[Transfer], object]" = lambda transfer: None,
) -> "SplitRuntime":
    """Make the SplitRuntime of a subject; `stack` closes it, `watch` is called for each transfer.

    Raises:
        MissingExtraError: the extra "split" is not installed.
        InputError, ConfigError, CutSetError, SpaceMismatchError: see `SplitRuntime`.
    """
    split = spec.split
    assert split is not None
    plan = SplitPlan.load(Path(split.plan))
    cuts = None if split.cuts is None else CutSet.open(split.cuts)
    encoder = FixedPrecisionEncoder(bundle, spec.device, spec.precision)
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


class _SplitRun:
    """Embeds pictures by a split plan and counts replies that the device had to compute itself."""

    def __init__(self, runtime: "SplitRuntime") -> None:
        self._runtime = runtime
        self._calls = 0
        self._degraded = Counter[str]()

    def __call__(self, batch: NDArray[Any]) -> FloatArray:
        """Embed encoded pictures, object [N]; returns float32 [N, dim]."""
        reply = self._runtime.encode_image(list(batch))
        self._calls += 1
        if reply.degraded is not None:
            self._degraded[reply.degraded] += 1
        return reply.value

    def remarks(self) -> Remarks:
        """Say how many replies fell back to the device, and why."""
        if not self._degraded:
            return ()
        reasons = ", ".join(f"{count} by {why}" for why, count in self._degraded.most_common())
        total = self._degraded.total()
        return (("server", f"{total} of {self._calls} answers are the device's own: {reasons}"),)


class FixedPrecisionEncoder(Encoder):
    """An encoder whose image tower runs in exactly one precision.

    `Encoder` falls back to a more exact precision where an engine computes wrong results; a
    measurement must be of the precision that it names.

    Args:
        bundle: an opened bundle.
        device: engine and allowed precisions.
        precision: precision of the image tower; by default the one that `Encoder` would choose.
    """

    def __init__(self, bundle: Bundle, device: DeviceProfile, precision: Precision | None) -> None:
        super().__init__(bundle, device)
        tower = bundle.manifest.tower("image")
        self.precisions["image"] = choose_precision(tower, device, precision)
        self._is_wanted = True


def _identity(
    spec: SubjectSpec,
    bundle: Bundle,
    tower: Tower,
    runner: TowerRunner,
    input_shape: Sequence[int],
) -> Identity:
    file = bundle.manifest.tower(tower).file(runner.precision)
    sizes = {item.path: item.bytes for item in bundle.manifest.files}
    weights = 0 if file.data_path is None else sizes[file.data_path]
    return Identity(
        bundle=bundle.manifest.name,
        sha256=bundle.sha256,
        precision=runner.precision,
        engine=spec.device.engine,
        provider=_provider(runner),
        threads=spec.device.threads,
        bytes_on_disk=sizes[file.path] + weights,
        input_shape=tuple(input_shape),
    )


def _provider(runner: TowerRunner) -> str:
    """Name the provider that computes; all of them, if the device allows a fallback."""
    engine = runner._engine
    if isinstance(engine, OrtEngine):
        used = list(map(str, engine._session.get_providers()))
        return ", ".join(used if runner.device.cpu_fallback else used[:1])
    from edgeclip.runtime.engines.tensorrt_library import open_library

    return open_library(runner.device).title


def _with_server(identity: Identity, plan: SplitPlan, split: SplitSpec) -> Identity:
    """Add the size of the tower's head, for a cut, and the model that runs on the server."""
    head = 0
    if split.cuts is not None and plan.cut:
        files = (Path(split.cuts, name) for name in (head_file_name(plan.cut), WEIGHTS_NAME))
        head = sum(file.stat().st_size for file in files if file.is_file())  # checked when opened
    provider = identity.provider
    if plan.kind in _KINDS_WITH_REMOTE_TOWER:
        provider += f" and {plan.model} at {split.server}"
    return replace(identity, bytes_on_disk=identity.bytes_on_disk + head, provider=provider)


def _read_pictures(spec: SubjectSpec) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
    """Return a subject's encoded pictures, object [N], and the first one's shape [1, H, W, 3].

    Raises:
        InputError: a file is missing or is not an image.
    """
    paths = tuple(map(Path, spec.pictures))
    sizes = [decode_image(path).full_size for path in paths]  # names the one that is damaged
    read = [path.read_bytes() for path in paths] or sample_pictures()
    contents = np.empty(len(read), dtype=object)
    contents[:] = read
    width, height = sizes[0] if sizes else decode_image(read[0]).full_size
    return contents, (1, height, width, 3)


_WIDTH, _HEIGHT = 640, 480
_COUNT = 4
_QUALITY = 90  # of JPEG
_CONTRAST = 50.0  # standard deviation of the levels
_COLOUR = 0.3  # weight of a channel's own noise beside the brightness that all channels share


@functools.cache
def sample_pictures() -> tuple[bytes, ...]:
    """Generate four JPEG files of 640 x 480 pixels with the statistics of photos, always the same.

    They decode as slowly as photos do, since their amplitude falls with the frequency as in
    natural images (Field, J. Opt. Soc. Am. A 4, 1987).
    """
    return tuple(map(_sample_picture, range(_COUNT)))


def _sample_picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    brightness = _noise(random)
    channels = [brightness + _COLOUR * _noise(random) for _ in range(3)]
    levels = np.clip(128 + _CONTRAST * np.stack(channels, axis=2), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _noise(random: np.random.Generator) -> NDArray[np.float64]:
    """Make noise [height, width] of mean 0, variance 1 and amplitude 1 / frequency."""
    down = np.fft.fftfreq(_HEIGHT)[:, None]
    across = np.fft.rfftfreq(_WIDTH)
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    noise = np.fft.irfft2(phases / frequency, s=(_HEIGHT, _WIDTH))
    normed: NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return normed
