"""Run one tower of a bundle on the device's engine: inputs, batches, checked outputs.

Its precision is chosen here, and another one where an engine computes it wrongly.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray, Outputs
from edgeclip.runtime.bundle.bundle import Bundle, Golden
from edgeclip.runtime.bundle.index import check_unit_rows, cosines
from edgeclip.runtime.bundle.manifest import GateRecord, TowerManifest, keeps_bound
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.errors import BundleError, EngineError, EngineParityError, InputError
from edgeclip.runtime.inputs.preprocess import normalise
from edgeclip.runtime.spec import (
    OUTPUT_NAMES,
    PIXEL_INPUTS,
    TEXT_INPUT,
    ImageSpec,
    PixelForm,
    Precision,
    Tower,
)

if TYPE_CHECKING:
    from edgeclip.runtime.bundle.engine_records import GraphSource
    from edgeclip.runtime.device.device_profile import DeviceProfile

_log = logging.getLogger(__name__)
# Smallest allowed cosine between an engine's embeddings and the bundle's golden ones (made with
# ONNX Runtime from the same graph). Some versions of TensorRT silently compute wrong numbers in
# half precision.
_LEAST_COSINE: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99, "fp8": 0.99}
_EXACTNESS: tuple[Precision, ...] = ("fp8", "int8", "fp16", "fp32")  # in rising order


class TowerRunner:
    """Runs one tower in one precision.

    Inputs are split into batches that the device and the graph accept; a graph with a fixed
    batch size gets its last batch padded.

    Attributes:
        precision: the precision that runs.
        device: the device that runs it.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the engine cannot load it.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(
        self, bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
    ) -> None:
        file = bundle.manifest.tower(tower).file(precision)
        self.precision: Precision = precision
        self.device = device
        self._tower: Tower = tower
        self._path = bundle.tower_path(tower, precision)
        self._spec = bundle.manifest.spec
        self._pixels = file.pixels
        self._fixed_batch = file.batch
        self._max_batch = device.batch_max
        start = time.perf_counter()
        self._engine = open_tower(bundle, tower, precision, device)
        seconds = time.perf_counter() - start
        _log.debug("%s loaded on %s in %.2f s", self._path, self._engine.name, seconds)

    def run(self, values: NDArray[Any]) -> FloatArray:
        """Embed inputs; float32 [N, dim].

        Args:
            values: uint8 [N, size, size, 3] for an image tower (see `crop_batch`), token ids
                int64 [N, length] for a text tower.

        Raises:
            EngineError: the engine failed, or its output has another shape or dtype, NaN, or
                embeddings whose length is not 1.
        """
        embeddings: FloatArray = self.outputs(values)[OUTPUT_NAMES[self._tower]]
        return embeddings

    def outputs(self, values: NDArray[Any]) -> Outputs:
        """Return all outputs of the graph: embeddings, patch features, labels.

        Raises:
            EngineError: see `run`.
        """
        outputs = in_batches(
            self._run, values, fixed_batch=self._fixed_batch, max_batch=self._max_batch
        )
        self._check(outputs.get(OUTPUT_NAMES[self._tower]), len(values))
        return outputs

    def _run(self, values: NDArray[Any]) -> Outputs:
        return self._engine.run(tower_feed(values, self._tower, self._pixels, self._spec.image))

    def _check(self, embeddings: NDArray[Any] | None, count: int) -> None:
        if embeddings is None:
            name = OUTPUT_NAMES[self._tower]
            raise EngineError(f"{self._path} has no output {name}: export the bundle again")
        expected = (count, self._spec.dim)
        if embeddings.shape != expected or embeddings.dtype != np.float32:
            raise EngineError(
                f"{self._path} gave {embeddings.dtype} {list(embeddings.shape)} instead of float32 "
                f"{list(expected)}: export the bundle again"
            )
        try:
            check_unit_rows(embeddings, f"the output of {self._path}")
        except InputError as error:
            raise EngineError(f"{error}; or use another precision") from error


def open_tower(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Engine:
    """Load a tower with the device's engine, after verifying the hashes of its files.

    TensorRT engines come from the bundle, from the cache of this machine, or are built now; each
    must agree with the bundle's golden embeddings before it is used, and so must a graph on
    OpenVINO, which is not what made them.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the engine cannot load it.
        EngineParityError: it gives other embeddings than the bundle recorded.
        MissingExtraError: the engine's package is not installed.
    """
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        return _open_tensorrt(bundle, tower, precision, device)
    path = bundle.tower_path(tower, precision)
    content = bundle.tower_bytes(tower, precision)
    data = bundle.manifest.tower(tower).file(precision).data_path
    folder = None if data is None else (bundle.path / data).parent
    length = bundle.manifest.spec.text.context_length if tower == "text" else None
    engine = open_engine(
        path, device=device, content=content, data_folder=folder, context_length=length
    )
    if device.engine == "openvino":
        check = golden_check(
            bundle,
            bundle.golden(),
            tower,
            precision,
            batches=(device.batch_min, device.batch_best),
            bfloat16=device.bfloat16,
        )
        for gate in check(engine):
            if not gate.passed:
                raise EngineParityError(
                    f"{device.engine} gives other embeddings than the bundle recorded: the "
                    f"{gate.name} of the {tower} tower in {precision} is {gate.value:.5f} "
                    f"(bound >= {gate.bound:g})"
                )
    return engine


def _open_tensorrt(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Engine:
    from edgeclip.runtime.engines.engine_cache import find_or_build
    from edgeclip.runtime.engines.tensorrt_library import open_library

    shipped = [
        (record, lambda path=record.path: bundle.file_bytes(path))
        for record in bundle.manifest.engines
        if (record.tower, record.precision) == (tower, precision)
    ]
    return find_or_build(
        graph_source(bundle, tower, precision),
        device=device,
        library=open_library(device),
        check=golden_check(
            bundle,
            bundle.golden(),
            tower,
            precision,
            batches=(device.batch_min, device.batch_best, device.batch_max),
        ),
        shipped=shipped,
    )


def graph_source(bundle: Bundle, tower: Tower, precision: Precision) -> "GraphSource":
    """Return the graph that TensorRT engines of a tower are built from.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
    """
    from edgeclip.runtime.bundle.engine_records import GraphSource, graph_sha256

    file = bundle.manifest.tower(tower).file(precision)
    hashes = {item.path: item.sha256 for item in bundle.manifest.files}
    names = [file.path] if file.data_path is None else [file.path, file.data_path]
    content = bundle.tower_bytes(tower, precision)
    return GraphSource(
        name=Path(file.path).stem,
        content=content if file.data_path is None else bundle.path / file.path,
        sha256=graph_sha256(*(hashes[name] for name in names)),
        text_length=bundle.manifest.spec.text.context_length if tower == "text" else None,
    )


def golden_check(
    bundle: Bundle,
    golden: Golden,
    tower: Tower,
    precision: Precision,
    *,
    batches: Sequence[int],
    bfloat16: bool = False,
) -> Callable[[Engine], tuple[GateRecord, ...]]:
    """Return a function that checks an engine's embeddings of the golden inputs.

    They are computed in batches of each of these sizes, for which an engine may have kernels of
    their own; a batch larger than all golden inputs repeats them. What computes in bfloat16 is
    held to the bound of fp16 at most.
    """
    file = bundle.manifest.tower(tower).file(precision)
    spec = bundle.manifest.spec.image
    (expected,) = (
        item.embeddings
        for item in golden.expected
        if (item.tower, item.precision) == (tower, precision)
    )

    def check(engine: Engine) -> tuple[GateRecord, ...]:
        inputs = golden.inputs(tower)
        least = 1.0
        for size in sorted({file.batch} if file.batch else set(batches)):
            rows = np.arange(-(-len(inputs) // size) * size) % len(inputs)  # whole batches
            embeddings = in_batches(
                lambda values: engine.run(tower_feed(values, tower, file.pixels, spec)),
                inputs[rows],
                max_batch=size,
            )[OUTPUT_NAMES[tower]]
            finite = np.isfinite(embeddings).all()
            least = min(least, float(cosines(embeddings, expected[rows]).min()) if finite else -1.0)
        bound = _LEAST_COSINE[precision]
        if bfloat16:
            bound = min(bound, _LEAST_COSINE["fp16"])
        return (
            GateRecord(
                name="least cosine with the golden embeddings",
                value=least,
                low=least,
                high=least,
                bound=bound,
                direction=">=",
                unit="cosine",
                outcome="passed" if keeps_bound(least, ">=", bound) else "failed",
                confidence=1.0,
            ),
        )

    return check


def tower_feed(
    values: NDArray[Any], tower: Tower, pixels: PixelForm | None, spec: ImageSpec
) -> dict[str, NDArray[Any]]:
    """Return a tower's input by name; images are normalised if the graph does not do it.

    Args:
        values: uint8 [N, size, size, 3], or token ids int64 [N, length].
        tower: image or text.
        pixels: input form of the image tower.
        spec: how images are normalised.
    """
    if tower == "text":
        return {TEXT_INPUT: values}
    form: PixelForm = pixels or "float32-nchw"
    return {PIXEL_INPUTS[form]: values if form == "uint8-nhwc" else normalise(values, spec)}


def in_batches(
    run: Callable[[NDArray[Any]], Outputs],
    values: NDArray[Any],
    *,
    fixed_batch: int | None = None,
    max_batch: int | None = None,
) -> Outputs:
    """Run `values` [N, ...] in batches that a graph accepts, and concatenate the outputs.

    Args:
        run: runs one batch.
        values: the inputs, at least one row.
        fixed_batch: the only batch size that the graph accepts; the last batch is padded with
            copies of its last row, whose outputs are dropped.
        max_batch: the largest batch that the graph accepts if the size may vary; None for no limit.
    """
    size = fixed_batch or max_batch or len(values)
    parts = []
    for start in range(0, len(values), size):
        batch = values[start : start + size]
        missing = 0 if fixed_batch is None else fixed_batch - len(batch)
        padded = np.concatenate([batch, batch[-1:].repeat(missing, 0)]) if missing else batch
        parts.append({name: value[: len(batch)] for name, value in run(padded).items()})
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def usable_precisions(tower: TowerManifest, device: "DeviceProfile") -> tuple[Precision, ...]:
    """Return the precisions of a tower that the device allows, in the device's order.

    int8 made for VNNI is left out on a CPU without VNNI, where its products would saturate.
    """
    held = {file.precision: file for file in tower.files}
    return tuple(
        precision
        for precision in device.precisions
        if precision in held and (device.vnni or not held[precision].needs_vnni)
    )


def choose_precision(
    tower: TowerManifest, device: "DeviceProfile", wanted: Precision | None = None
) -> Precision:
    """Return `wanted`, else the bundle's default, else the first precision the device allows.

    Raises:
        InputError: the device does not allow `wanted`, or would compute it wrongly.
        BundleError: the bundle does not contain `wanted`, or no precision the device allows.
    """
    allowed = " or ".join(device.precisions)
    if wanted is not None:
        if wanted not in device.precisions:
            raise InputError(f"device {device.name!r} does not allow {wanted}: choose {allowed}")
        if tower.file(wanted).needs_vnni and not device.vnni:
            raise InputError(
                f"the {wanted} {tower.tower} tower was made for CPUs with VNNI, which device "
                f"{device.name!r} lacks: choose another precision, or export it for this device"
            )
        return wanted
    usable = usable_precisions(tower, device)
    if tower.chosen in usable:
        return tower.chosen
    if not usable:
        raise BundleError(
            f"the bundle holds the {tower.tower} tower in {', '.join(tower.precisions)}, but "
            f"device {device.name!r} allows {allowed}: export it in one of these"
        )
    return usable[0]


OpenRunner = Callable[[Bundle, Tower, Precision, "DeviceProfile"], TowerRunner]


def open_with_fallback(
    bundle: Bundle,
    tower: Tower,
    precision: Precision,
    device: "DeviceProfile",
    *,
    open_runner: OpenRunner = TowerRunner,
) -> TowerRunner:
    """Load a tower; if its engine is wrong, load a more exact one, and finally fp32 on the CPU.

    Some versions of TensorRT silently compute wrong numbers in half precision; such an engine
    misses its parity gate on the device. The fallback is slower but correct, and each step is
    logged as a warning. Other failures, such as a missing GPU, remain errors.

    Args:
        bundle: the bundle of the tower.
        tower: image or text.
        precision: the precision to try first.
        device: where the tower runs.
        open_runner: loads one precision on one device.

    Raises:
        EngineParityError: the engine of every precision is wrong.
        EngineError, BundleError, MissingExtraError: see `TowerRunner`.
    """
    attempts = list(_attempts(bundle, tower, precision, device))
    for (precision, device), (next_precision, next_device) in itertools.pairwise(attempts):
        try:
            return open_runner(bundle, tower, precision, device)
        except EngineParityError as error:
            place = "" if next_device is device else " with ONNX Runtime on the CPU, which is slow"
            _log.warning("%s; using %s for the %s tower%s", error, next_precision, tower, place)
    precision, device = attempts[-1]
    return open_runner(bundle, tower, precision, device)


def _attempts(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Iterator[tuple[Precision, "DeviceProfile"]]:
    """Yield precision and device of each attempt, the wanted one first."""
    yield precision, device
    usable = usable_precisions(bundle.manifest.tower(tower), device)
    for more_exact in _EXACTNESS[_EXACTNESS.index(precision) + 1 :]:
        if more_exact in usable:
            yield more_exact, device
    if device.engine != "onnxruntime-cpu" and "fp32" in bundle.manifest.tower(tower).precisions:
        yield "fp32", device.cpu_profile()
