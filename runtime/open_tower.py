"""A tower of a bundle on the device's engine, whichever that is."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.engine import Engine, open_engine
from edgeclip.runtime.golden import Golden
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.quality import Interval, cosines
from edgeclip.runtime.spec import OUTPUT_NAMES, Precision, Tower
from edgeclip.runtime.tower_feed import in_batches, tower_feed

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile
    from edgeclip.runtime.engine_key import GraphSource

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
    from edgeclip.runtime.engine_key import GraphSource, graph_sha256

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
    from edgeclip.runtime.engine_store import find_or_build
    from edgeclip.runtime.tensorrt_library import open_library

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
