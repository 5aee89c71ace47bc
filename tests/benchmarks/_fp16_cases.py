"""Towers that are turned into fp16: the built-in student's, and those with known collapses."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.inputs.preprocess import preprocess_batch

sys.path.append(str(Path(__file__).parents[2]))  # for `tests`, which is not installed
from tests.export.quantizing.collapse_models import (
    BUNDLE,
    TEXT_TOWER,
    captions,
    decompose_layer_norms,
    naive_half,
    with_lowest_mask,
    with_massive_activation,
    with_offset,
)

IMAGE_TOWER = BUNDLE / "onnx" / "vision_model.onnx"
Change = Callable[[onnx.ModelProto], None]
COLLAPSES: dict[str, tuple[Change, ...]] = {
    "massive activation": (with_massive_activation,),
    "the same, LayerNorms taken apart": (with_massive_activation, decompose_layer_norms),
    "mask of the lowest number": (with_lowest_mask,),
    "offset of 300": (with_offset,),
    "offset of 3000": (lambda model: with_offset(model, 3000),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tower in fp32.

    Attributes:
        name: for the table.
        source: the ONNX file.
        seen: what it is calibrated on.
        unseen: what it is judged on.
        rows: all that is seen, as `_quantizer_process.py` reads it.
    """

    name: str
    source: Path
    seen: CalibrationData
    unseen: CalibrationData
    rows: Path


def open_cases(folder: Path, count: int) -> Iterator[Case]:
    """Write all towers and their inputs into a folder; `count` inputs to calibrate on."""
    rows = folder / "images.npy"
    seen, unseen = _images("calibration", count), _images("test", 2 * count)
    np.save(rows, np.concatenate([seen.batch(index) for index in range(seen.count)]))
    yield Case(name="student, image", source=IMAGE_TOWER, seen=seen, unseen=unseen, rows=rows)
    rows = folder / "texts.npz"
    seen, unseen = captions(1, count), captions(2, 2 * count)
    values, lengths = _padded([seen.batch(index) for index in range(seen.count)])
    np.savez(rows, values=values, lengths=lengths)
    yield Case(name="student, text", source=TEXT_TOWER, seen=seen, unseen=unseen, rows=rows)
    for name, changes in COLLAPSES.items():
        model, source = load_graph(TEXT_TOWER), folder / f"{name.replace(' ', '_')}.onnx"
        for change in changes:
            change(model)
        save_graph(model, source)
        yield Case(name=name, source=source, seen=seen, unseen=unseen, rows=rows)


def write_naive(case: Case, target: Path) -> None:
    """Every node and every weight; what is too large becomes infinite."""
    naive_half(case.source, target, cut=False)


def _images(split: Any, count: int) -> CalibrationData:
    """Scenes in one batch, float32 [N, 3, size, size]."""
    spec = Bundle.open(BUNDLE).manifest.spec.image
    source = EmojiSource(split, count, size=spec.size, distinct=True)
    pixels = preprocess_batch([source[index].image for index in range(count)], spec)
    return CalibrationData(1, lambda _: pixels)


def _padded(batches: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [N, length] of batches of several lengths, and how many belong to each text."""
    spec = Bundle.open(BUNDLE).manifest.spec.text
    longest = max(batch.shape[1] for batch in batches)
    values = np.concatenate(
        [
            np.pad(batch, ((0, 0), (0, longest - batch.shape[1])), constant_values=spec.pad_id)
            for batch in batches
        ]
    )
    return values, 1 + (values == spec.eos_id).argmax(axis=1)
