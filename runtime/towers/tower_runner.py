"""One tower of a bundle, loaded on the device's engine: feeds, batches, checked outputs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Outputs
from edgeclip.runtime.bundle.bundle import Bundle, Golden
from edgeclip.runtime.bundle.index import check_unit_rows, cosines
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.inputs.preprocess import normalise
from edgeclip.runtime.quality.intervals import Interval
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


def tower_feed(
    values: NDArray[Any], tower: Tower, pixels: PixelForm | None, spec: ImageSpec
) -> dict[str, NDArray[Any]]:
    """Name a tower's input; pictures are normalised for a graph that does not do it itself.

    Args:
        values: uint8 [N, size, size, 3], or token ids int64 [N, length].
        tower: which one it is for.
        pixels: what the image tower takes.
        spec: how pictures are normalised.
    """
    if tower == "text":
        return {TEXT_INPUT: values}
    form: PixelForm = pixels or "float32-nchw"
    return {PIXEL_INPUTS[form]: values if form == "uint8-nhwc" else normalise(values, spec)}


def in_batches(
    run: Callable[[NDArray[Any]], Outputs],
    values: NDArray[Any],
    *,
    static: int | None = None,
    most: int | None = None,
) -> Outputs:
    """Run `values` [N, ...] in pieces that a graph takes, and join what it gives.

    Args:
        run: runs one piece.
        values: at least one row.
        static: the only batch size that the graph takes; the last piece is filled up with
            copies of its last row, whose results are dropped.
        most: the largest batch otherwise; None for any.
    """
    size = static or most or len(values)
    parts = []
    for start in range(0, len(values), size):
        piece = values[start : start + size]
        found = run(_filled(piece, static))
        parts.append({name: value[: len(piece)] for name, value in found.items()})
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _filled(values: NDArray[Any], batch: int | None) -> NDArray[Any]:
    """Repeat the last row until there are `batch`."""
    missing = 0 if batch is None else batch - len(values)
    return values if missing == 0 else np.concatenate([values, values[-1:].repeat(missing, 0)])


# An engine is held against what ONNX Runtime made of the same graph: some versions of
# TensorRT give wrong numbers in half precision without a word.
_BOUNDS: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99, "fp8": 0.99}


def open_tower(
    bundle: Bundle, tower: Tower, precision: Precision, device: "DeviceProfile"
) -> Engine:
    """Load a tower with the device's engine; what is loaded was verified.

    TensorRT's engines come from the bundle, from those that were kept on this machine, or
    are built now; each must agree with the bundle's golden embeddings before it is used.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the engine cannot load it, or an engine built here is wrong.
        MissingExtraError: the engine's package is not installed.
    """
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        return _open_tensorrt(bundle, tower, precision, device)
    path = bundle.tower_path(tower, precision)
    content = bundle.tower_bytes(tower, precision)
    data = bundle.manifest.tower(tower).file(precision).data_path
    folder = None if data is None else (bundle.path / data).parent
    length = bundle.manifest.spec.text.context_length if tower == "text" else None
    return open_engine(
        path, device=device, content=content, data_folder=folder, context_length=length
    )


def graph_source(bundle: Bundle, tower: Tower, precision: Precision) -> "GraphSource":
    """The graph that engines of a tower are made of.

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


def golden_gate(
    bundle: Bundle, golden: Golden, tower: Tower, precision: Precision
) -> Callable[[Engine], tuple[GateRecord, ...]]:
    """Make the function that holds an engine against the bundle's golden embeddings."""
    file = bundle.manifest.tower(tower).file(precision)
    spec = bundle.manifest.spec.image
    (expected,) = (
        item.embeddings
        for item in golden.expected
        if (item.tower, item.precision) == (tower, precision)
    )

    def gate(engine: Engine) -> tuple[GateRecord, ...]:
        found = in_batches(
            lambda values: engine.run(tower_feed(values, tower, file.pixels, spec)),
            golden.inputs(tower),
            static=file.batch,
            most=1,  # the one batch size that every engine takes, if none is fixed
        )[OUTPUT_NAMES[tower]]
        least = float(cosines(found, expected).min()) if np.isfinite(found).all() else -1.0
        bound, measured = _BOUNDS[precision], Interval(least, least, least)
        return (
            GateRecord(
                name="least cosine with the golden embeddings",
                value=measured.value,
                low=measured.low,
                high=measured.high,
                bound=bound,
                direction=">=",
                unit="cosine",
                passed=least >= bound,
            ),
        )

    return gate


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
        gate=golden_gate(bundle, bundle.golden(), tower, precision),
        say=_say,
        shipped=shipped,
    )


def _say(line: str) -> None:
    print(f"edgeclip: {line}", file=sys.stderr, flush=True)


class TowerRunner:
    """Runs one tower.

    Batches are cut to what the device and the graph take. A graph made for one batch size
    is given the last row again where rows are missing.

    Attributes:
        precision: the one that runs.
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
        self._batch = file.batch
        self._most = device.batch_max
        self._engine = open_tower(bundle, tower, precision, device)

    def run(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Embed inputs; float32 [N, dim].

        Args:
            values: uint8 [N, size, size, 3] for an image tower (see `crop_batch`), token ids
                int64 [N, length] for a text tower.

        Raises:
            EngineError: the engine failed, or gave another shape or dtype, NaN, or
                embeddings whose length is not 1.
        """
        found: NDArray[np.float32] = self.outputs(values)[OUTPUT_NAMES[self._tower]]
        return found

    def outputs(self, values: NDArray[Any]) -> Outputs:
        """Return all that the graph gives: embeddings, and what its heads compute.

        Raises:
            EngineError: see `run`.
        """
        found = in_batches(self._run, values, static=self._batch, most=self._most)
        self._check(found.get(OUTPUT_NAMES[self._tower]), len(values))
        return found

    def _run(self, values: NDArray[Any]) -> Outputs:
        return self._engine.run(tower_feed(values, self._tower, self._pixels, self._spec.image))

    def _check(self, found: NDArray[Any] | None, count: int) -> None:
        if found is None:
            name = OUTPUT_NAMES[self._tower]
            raise EngineError(f"{self._path} has no output {name}: export the bundle again")
        expected = (count, self._spec.dim)
        if found.shape != expected or found.dtype != np.float32:
            raise EngineError(
                f"{self._path} gave {found.dtype} {list(found.shape)} instead of float32 "
                f"{list(expected)}: export the bundle again"
            )
        try:
            check_unit_rows(found, f"the output of {self._path}")
        except InputError as error:
            raise EngineError(f"{error}; or use another precision") from error
