"""fp16 with islands of fp32: EdgeCLIP's search against AutoCast of NVIDIA's Model-Optimizer.

Both turn the same towers into fp16 and see the same inputs before. AutoCast keeps in fp32 what
reads or gives values beyond 512, and weights beyond fp16; EdgeCLIP what is beyond a quarter of
what fp16 holds, and the fewest nodes without which the measured cosine is too low. The towers
are those of the built-in student, and its text tower brought to the collapses that fp16 is known
for. "all in fp16" is what a converter does that looks at nothing.

No GPU is needed, and no time is measured: cosines to fp32 are those of unseen inputs with every
fp16 value rounded as a GPU stores it (`emulate_fp16`). A file that keeps everything in fp32 would
be exact, so the table also counts products in fp16, casts and bytes. AutoCast is installed in
build/modelopt; `--quick` leaves it out. The whole takes a few minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _bars import Bar, Rule, finish, options
from _processes import UnavailableError, environment
from _quantizer_case import gate_bars, make

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, judge_tower
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import PRODUCTS, load_graph, save_graph
from edgeclip.export.quantizing.fp16 import emulate_fp16, fp16_values, write_fp16
from edgeclip.export.quantizing.mixed_fp16 import embed_graph, find_islands
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.console import columns
from edgeclip.runtime.errors import EngineError, first_line
from edgeclip.runtime.inputs.preprocess import preprocess_batch
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

BARS: dict[str, Rule] = {
    "*_usable_embeddings": (">=", 1.0, "share"),
    "*_mean_cosine": (">=", 0.999, "cosine"),
    "*_1st_percentile_cosine": (">=", 0.995, "cosine"),
}
KEPT_MODELS = ("export/emoji_bundle",)

REQUIREMENTS = ("nvidia-modelopt[onnx]==0.47.0", f"torch=={version('torch').split('+')[0]}")
OURS, AUTOCAST, NAIVE = "EdgeCLIP", "AutoCast", "all in fp16"
IMAGE_TOWER = BUNDLE / "onnx" / "vision_model.onnx"
COLLAPSES: dict[str, tuple[Callable[[onnx.ModelProto], None], ...]] = {
    "massive activation": (with_massive_activation,),
    "the same, LayerNorms taken apart": (with_massive_activation, decompose_layer_norms),
    "mask of the lowest number": (with_lowest_mask,),
    "offset of 300": (with_offset,),
    "offset of 3000": (lambda model: with_offset(model, 3000),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tower in fp32, what it is calibrated on (also as `rows` for AutoCast), and judged on."""

    name: str
    source: Path
    seen: CalibrationData
    unseen: CalibrationData
    rows: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to fp16 of one tower: cosines to fp32, how many products are in fp16, of how many."""

    model: str
    form: str
    records: tuple[GateRecord, ...] = ()
    mean: float | None = None
    least: float | None = None
    casts: int = 0
    half: int = 0
    products: int = 0
    megabytes: float = 0.0
    why: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.records) and all(record.passed for record in self.records)


Write = Callable[[Case, Path], None]


def open_cases(folder: Path, count: int) -> Iterator[Case]:
    """Write all towers and their inputs into a folder; `count` inputs to calibrate on."""
    rows = folder / "images.npz"
    seen, unseen = images("calibration", count), images("test", 2 * count)
    np.savez(rows, *np.split(seen.batch(0), count))
    yield Case(name="student, image", source=IMAGE_TOWER, seen=seen, unseen=unseen, rows=rows)
    rows, padding = folder / "texts.npz", Bundle.open(BUNDLE).manifest.spec.text.pad_id
    seen, unseen = captions(1, count), captions(2, 2 * count)
    batches = [seen.batch(index) for index in range(seen.count)]
    longest = max(batch.shape[1] for batch in batches)
    padded = [
        np.pad(batch, ((0, 0), (0, longest - batch.shape[1])), constant_values=padding)
        for batch in batches
    ]
    np.savez(rows, *np.split(np.concatenate(padded), count))
    yield Case(name="student, text", source=TEXT_TOWER, seen=seen, unseen=unseen, rows=rows)
    for name, changes in COLLAPSES.items():
        model, source = load_graph(TEXT_TOWER), folder / f"{name.replace(' ', '_')}.onnx"
        for change in changes:
            change(model)
        save_graph(model, source)
        yield Case(name=name, source=source, seen=seen, unseen=unseen, rows=rows)


def images(split: Any, count: int) -> CalibrationData:
    """Scenes in one batch, float32 [N, 3, size, size]."""
    spec = Bundle.open(BUNDLE).manifest.spec.image
    source = EmojiSource(split, count, size=spec.size, distinct=True)
    pixels = preprocess_batch([source[index].image for index in range(count)], spec)
    return CalibrationData(1, lambda _: pixels)


def ways(*, quick: bool) -> dict[str, Write | str]:
    """All ways to fp16, or why one is not there."""

    def ours(case: Case, target: Path) -> None:
        islands = find_islands(case.source, case.seen)
        write_fp16(case.source, target, case.seen, islands=islands)

    found: dict[str, Write | str] = {OURS: ours}
    found[NAIVE] = lambda case, target: naive_half(case.source, target, cut=False)
    if not quick:
        try:
            python = environment("modelopt", REQUIREMENTS)
            found[AUTOCAST] = lambda case, to: make("autocast", case.source, to, case.rows, python)
        except UnavailableError as error:
            found[AUTOCAST] = str(error)
    return found


def rows_of(case: Case, ways: dict[str, Write | str], folder: Path) -> Iterator[Row]:
    """Write and judge a tower in all ways; a way that is a text says why it is not there."""
    right = embed_graph(load_graph(case.source), case.unseen)
    for form, write in ways.items():
        target = folder / f"{form.replace(' ', '_')}.onnx"
        try:
            if isinstance(write, str):
                raise UnavailableError(write)
            write(case, target)
            embed_graph(load_graph(target), case.unseen)  # what runs nowhere is not there
            model = load_graph(target)
            found = embed_graph(emulate_fp16(model), case.unseen)
        except (UnavailableError, EngineError, ExportError) as error:
            yield Row(model=case.name, form=form, why=first_line(error))
            continue
        halves, nodes = fp16_values(model), model.graph.node
        products = [node for node in nodes if node.op_type in PRODUCTS]
        alike = cosines(found, right) if np.isfinite(found).all() else None
        yield Row(
            model=case.name,
            form=form,
            records=judge_tower(found, right, DEFAULT_BOUNDS["fp16"]),
            mean=None if alike is None else float(alike.mean()),
            least=None if alike is None else float(alike.min()),
            casts=sum(node.op_type == "Cast" for node in nodes),
            half=sum(node.output[0] in halves for node in products),
            products=len(products),
            megabytes=target.stat().st_size / 1e6,
        )


def table(rows: Sequence[Row]) -> str:
    cells = [("tower", "by", "gates", "mean cosine", "least", "products", "casts", "MB")]
    for row in rows:
        mean, least = ("NaN" if item is None else f"{item:.7f}" for item in (row.mean, row.least))
        inside = "inside" if row.passed else row.why or "missed"
        counts = (f"{row.half}/{row.products}", str(row.casts), f"{row.megabytes:.2f}")
        cells.append((row.model, row.form, inside, mean, least, *counts))
    return columns(cells, left=3)


def main() -> int:
    args = options(__doc__).parse_args()
    found = ways(quick=args.quick)
    with tempfile.TemporaryDirectory() as name:
        cases = open_cases(Path(name), 50 if args.quick else 100)
        rows = [row for case in cases for row in rows_of(case, found, Path(name))]
    print(table(rows))
    bars: list[Bar] = []
    for row in rows:
        if row.form == OURS:
            bars += gate_bars(row.model.replace(",", "").replace(" ", "_"), row.records)
    return finish(bars, args.out, requirements=REQUIREMENTS, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
