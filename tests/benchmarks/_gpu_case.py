"""One tower of one model on one batch: what candidates are given, and what is right."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.embedders import tower_inputs
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.to_onnx import export_tower
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import OUTPUT_NAMES, PIXEL_INPUTS, TEXT_INPUT, PixelForm, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

GpuPrecision = Literal["fp32", "fp16"]
PRECISIONS: tuple[GpuPrecision, ...] = ("fp32", "fp16")

_PIXELS: PixelForm = "float32-nchw"
_INPUTS = 32  # how many different pictures and captions there are
_BOUNDS: dict[GpuPrecision, float] = {"fp32": 0.9999, "fp16": 0.999}  # those of `open_tower`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """What all candidates of a table get.

    Attributes:
        model: a short name.
        tower: which one.
        dual: the model in fp32 in the memory of the CPU, attention written out.
        graphs: the tower's ONNX files.
        values: float32 [batch, 3, size, size], normalised, or token ids int64 [batch, length].
        expected: float32 [32, dim], what torch computes on the CPU in fp32 of 32 inputs, those
            of `values` first.
    """

    model: str
    tower: Tower
    dual: DualEncoder
    graphs: Mapping[GpuPrecision, Path]
    values: NDArray[Any]
    expected: FloatArray

    @property
    def batch(self) -> int:
        """How many pictures or texts are embedded at once."""
        return len(self.values)

    @property
    def text_length(self) -> int | None:
        """The most tokens of one text; None for an image tower."""
        return self.dual.spec.text.context_length if self.tower == "text" else None

    @property
    def input_name(self) -> str:
        """What the graphs call their input."""
        return TEXT_INPUT if self.tower == "text" else PIXEL_INPUTS[_PIXELS]

    @property
    def output_name(self) -> str:
        """What the graphs call their output."""
        return OUTPUT_NAMES[self.tower]

    def judge(self, found: NDArray[Any], precision: GpuPrecision) -> tuple[float | None, str]:
        """The least cosine of embeddings [batch, dim] with torch's; and what is wrong, or "".

        Random weights bring all embeddings close together, so each must also be nearer to its
        own input's than to any other's.
        """
        try:
            least = float(cosines(found, self.expected[: self.batch]).min())
        except InputError as error:
            return None, str(error)
        bound = _BOUNDS[precision]
        if least < bound:
            return least, f"least cosine with torch fp32 {least:.4f} (bound >= {bound:g})"
        nearest = (found.astype(np.float64) @ self.expected.T).argmax(axis=1)
        strays = np.flatnonzero(nearest != np.arange(self.batch))
        if len(strays):
            return least, f"row {strays[0]} is nearest to the embedding of another input"
        return least, ""


@dataclass(frozen=True, slots=True)
class Resident:
    """A batch that lies in the GPU's memory.

    Attributes:
        run: embeds it, the result staying there too; returns when the GPU is done.
        fetch: copies the result of the last `run` to host memory.
    """

    run: Callable[[], None]
    fetch: Callable[[], NDArray[Any]]


class Runner(Protocol):
    """A candidate, loaded for a case. Any error says that it cannot run here."""

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        """Embed a batch that lies in host memory; the result lies there too."""
        ...

    def place(self, values: NDArray[Any]) -> Resident:
        """Put a batch into the GPU's memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to compute a tower.

    Attributes:
        name: unique, for the table.
        precision: which bound its embeddings must meet.
        open: loads it for a case.
        ours: it is one of the runtime's own engines.
        slow: it takes minutes to load, which `--quick` does not.
    """

    name: str
    precision: GpuPrecision
    open: Callable[[Case], Runner]
    ours: bool = False
    slow: bool = False


def cases(
    model: str, dual: DualEncoder, tower: Tower, batches: Sequence[int], folder: Path
) -> Iterator[Case]:
    """Export a tower into an empty folder, and yield a case for each batch size.

    Fp16 graphs are made as for a bundle: what goes beyond half precision stays in fp32.
    """
    values = _inputs(dual, tower)
    graphs = {precision: folder / tower_path(tower, precision) for precision in PRECISIONS}
    export_tower(dual, tower, graphs["fp32"])
    write_fp16(graphs["fp32"], graphs["fp16"], CalibrationData(1, lambda _: values))
    with torch.inference_mode():
        expected = tower_module(dual, tower)(torch.from_numpy(values)).numpy()
    for batch in batches:
        yield Case(
            model=model,
            tower=tower,
            dual=dual,
            graphs=graphs,
            values=values[:batch],
            expected=expected,
        )


def _inputs(dual: DualEncoder, tower: Tower) -> NDArray[Any]:
    source = EmojiSource("test", _INPUTS, size=dual.spec.image.size)
    (given,) = tower_inputs(dual, tower, source, batch_size=_INPUTS)
    (values,) = tower_feed(given, tower, _PIXELS, dual.spec.image).values()
    return values
