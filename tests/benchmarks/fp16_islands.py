"""fp16 with islands of fp32: EdgeCLIP's search against AutoCast of NVIDIA's Model-Optimizer.

Both turn the same towers into fp16 and see the same inputs before. AutoCast keeps in fp32 what
reads or gives values beyond 512, and weights beyond fp16; EdgeCLIP what is beyond a quarter of
what fp16 holds, and the fewest nodes without which the measured cosine is too low. The towers
are those of the built-in student, and its text tower brought to the collapses that fp16 is known
for. "all in fp16" is what a converter does that looks at nothing.

No GPU is needed, and no time is measured: cosines to fp32 are those of unseen inputs with every
fp16 value rounded as a GPU stores it (`emulate_fp16`). A file that keeps everything in fp32 would
be exact, so the table also counts products in fp16, casts and bytes. EdgeCLIP must be inside the
gates of fp16 on all towers.

AutoCast is installed under `--work`; `--quick` leaves it out. The whole takes a few minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from _bars import Bar, finish, options
from _environment import InstallError, environment
from _fp16_cases import Case, open_cases, write_naive
from _quantizer_grow import BUILD
from _quantizer_race import make
from _quantizer_rows import Row as GateRow
from _quantizer_rows import gate_bars

from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, judge_tower
from edgeclip.export.graph.graph_io import PRODUCTS, load_graph
from edgeclip.export.quantizing.fp16 import emulate_fp16, fp16_values, write_fp16
from edgeclip.export.quantizing.mixed_fp16 import embed_graph, find_islands
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.errors import EngineError, first_line

REQUIREMENTS = (
    "nvidia-modelopt[onnx]==0.47.0",
    f"torch=={version('torch').split('+')[0]}",
)
OURS, AUTOCAST, NAIVE = "EdgeCLIP", "AutoCast", "all in fp16"
_ALIKE, _NOTHING = 1.2, 1e-5  # a factor and a difference between losses of cosine that say little


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to fp16 of one tower.

    Attributes:
        model: which tower.
        form: who made it.
        records: its gates.
        mean, least: cosine to fp32; None where embeddings are no numbers.
        casts: how many Cast nodes.
        half, products: how many of the products are computed in fp16, of how many.
        megabytes: of the file, 10^6 bytes.
        why: it is not there.
    """

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
        """Whether it is there and inside its gates."""
        return bool(self.records) and all(record.passed for record in self.records)


Write = Callable[[Case, Path], None]


def write_ours(case: Case, target: Path) -> None:
    """As `edgeclip quantize` does."""
    islands = find_islands(case.source, case.seen)
    write_fp16(case.source, target, case.seen, islands=islands)


def autocast_of(python: Path) -> Write:
    """AutoCast, in the environment that has it."""
    return lambda case, target: make("autocast", case.source, target, case.rows, python)


def rows_of(case: Case, ways: dict[str, Write | str], folder: Path) -> Iterator[Row]:
    """Write and judge a tower in all ways; a way that is a text says why it is not there."""
    right = embed_graph(load_graph(case.source), case.unseen)
    for form, write in ways.items():
        target = folder / f"{form.replace(' ', '_')}.onnx"
        try:
            if isinstance(write, str):
                raise EngineError(write)
            write(case, target)
            embed_graph(load_graph(target), case.unseen)  # what runs nowhere is not there
            model = load_graph(target)
            found = embed_graph(emulate_fp16(model), case.unseen)
        except (EngineError, ExportError) as error:
            yield Row(model=case.name, form=form, why=first_line(error))
        else:
            yield _judged(Row(model=case.name, form=form), target, model, found, right)


def _judged(
    row: Row, target: Path, model: onnx.ModelProto, found: FloatArray, right: FloatArray
) -> Row:
    halves = fp16_values(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    alike = cosines(found, right) if np.isfinite(found).all() else None
    return Row(
        model=row.model,
        form=row.form,
        records=judge_tower(found, right, DEFAULT_BOUNDS["fp16"]),
        mean=None if alike is None else float(alike.mean()),
        least=None if alike is None else float(alike.min()),
        casts=sum(node.op_type == "Cast" for node in model.graph.node),
        half=sum(node.output[0] in halves for node in products),
        products=len(products),
        megabytes=target.stat().st_size / 1e6,
    )


def print_rows(rows: Sequence[Row]) -> None:
    """The table, and who is better at what."""
    print(
        f"{'tower':<34}{'by':<13}{'gates':<8}{'mean cosine':>12}{'least':>11}{'products':>10}"
        f"{'casts':>7}{'MB':>7}"
    )
    for row in rows:
        if row.why:
            print(f"{row.model:<34}{row.form:<13}{row.why}")
            continue
        mean, least = ("NaN" if item is None else f"{item:.7f}" for item in (row.mean, row.least))
        print(
            f"{row.model:<34}{row.form:<13}{'inside' if row.passed else 'missed':<8}{mean:>12}"
            f"{least:>11}{f'{row.half}/{row.products}':>10}{row.casts:>7}{row.megabytes:>7.2f}"
        )
    print()
    for model in dict.fromkeys(row.model for row in rows):
        found = {row.form: row for row in rows if row.model == model}
        if AUTOCAST in found:
            print(f"{model:<34}better: {verdict(found[OURS], found[AUTOCAST])}")


def verdict(ours: Row, theirs: Row) -> str:
    """Who is better at what."""
    if ours.passed != theirs.passed:
        return f"{(ours if ours.passed else theirs).form}, alone inside the gates"
    if not ours.passed:
        return "neither is inside the gates"
    said = [
        f"{one.form} ({', '.join(words)})"
        for one, other in ((ours, theirs), (theirs, ours))
        if (words := list(_better(one, other)))
    ]
    return "; ".join(said) or "alike"


def _better(one: Row, other: Row) -> Iterator[str]:
    assert one.mean is not None
    assert other.mean is not None
    if 1 - one.mean + _NOTHING < (1 - other.mean) / _ALIKE:
        yield "closer to fp32"
    if one.half > other.half:
        yield "more products in fp16"
    if one.casts < other.casts:
        yield "fewer casts"
    if one.megabytes < 0.99 * other.megabytes:
        yield "smaller"


def ways(work: Path, *, quick: bool) -> dict[str, Write | str]:
    """All ways to fp16, or why one is not there."""
    found: dict[str, Write | str] = {NAIVE: write_naive, OURS: write_ours}
    if not quick:
        try:
            python = environment(work / "modelopt", REQUIREMENTS).python
            found[AUTOCAST] = autocast_of(python)
        except InstallError as error:
            found[AUTOCAST] = str(error)
    return found


def main() -> int:
    """Convert by all, judge, print the table, write the figures."""
    parser = options(__doc__ or "")
    parser.add_argument("--work", type=Path, default=BUILD, help="where AutoCast is installed")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = ways(work, quick=args.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = open_cases(folder, 50 if args.quick else 100)
        rows = [row for case in cases for row in rows_of(case, found, folder)]
    print_rows(rows)
    bars: list[Bar] = []
    for row in rows:
        if row.form == OURS:
            model = row.model.replace(",", "").replace(" ", "_")
            bars += gate_bars(GateRow(model=model, form=OURS, records=row.records))
    return finish(bars, args.out, requirements=REQUIREMENTS, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
