"""Four ways to int8 side by side: the same towers, the same pairs to calibrate and to test on.

ONNX Runtime's own quantizer with its defaults, optimum-onnx's recipe for CPUs with AVX512-VNNI,
NNCF (for OpenVINO, and its ONNX form for ONNX Runtime), and what EdgeCLIP chooses. Each of the
others gets the plain fp32 export, as its users have it; and where that stays inside the gates,
also EdgeCLIP's fp32 graph, to tell quantizing from the work on the graph. All calibrate on all
pairs that EdgeCLIP has, those by which it chooses among them.

Every file runs in a process of its own, one run at a time, in turns, at batch 1 and with one
thread, by ONNX Runtime; NNCF's by OpenVINO compiled for latency, as OpenVINO would (which may
compute in bfloat16) and in fp32. EdgeCLIP's file runs there too. Towers are both of the
built-in student and the ViT of 8 M parameters of `int8_speedup.py`.

Ours must be no slower than any other in ONNX Runtime that is inside its gates, beyond what two
runs of the same file differ by. OpenVINO is another engine: its rows are told, not held.

optimum and NNCF are installed under `--work`; `--quick` leaves them and the large tower out.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from _bars import Bar, finish, options
from _consumer_install import InstallError
from _interop_install import environment
from _quantizer_case import OURS, PLAIN, QUICK, Case, Sizes, chosen_config, open_case, size_mb
from _quantizer_grow import VIT_8M, grown
from _quantizer_race import Effort, Entrant, FloatArray, make, race
from _quantizer_rows import Row, gate_bars, print_quality, print_speed
from _quantizer_student import kept_student

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.quantizing.config import default_config
from edgeclip.profiles.device import load_device
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Tower

FULL = Sizes(ranges=128, steering=128, test=300, labelled=200, minutes=6)
HERE, OPTIMUM, NNCF = "here", "optimum", "nncf"
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    OPTIMUM: ("optimum-onnx[onnxruntime]==0.1.0", f"torch=={version('torch').split('+')[0]}"),
    NNCF: ("nncf==3.4.0", f"openvino=={version('openvino')}", f"onnx=={version('onnx')}"),
}
PLAIN_FP32, OUR_FP32, CHOSEN, AGAIN = "plain fp32", "our fp32", "ours", "ours, the same again"
DEFAULT = "ours, not searched"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How others quantize.

    Attributes:
        name: for the table.
        recipe: one of `_quantizer_process.py`.
        home: the environment that has it.
        engines: what runs the result, by what the table adds to the name.
    """

    name: str
    recipe: str
    home: str = HERE
    engines: tuple[tuple[str, str], ...] = (("", "onnxruntime"),)

    @property
    def suffix(self) -> str:
        """Of its files."""
        return ".onnx" if self.engines[0][1] == "onnxruntime" else ".xml"


OPENVINO = ((", OpenVINO", "openvino"), (", OpenVINO fp32", "openvino-f32"))
METHODS = (
    Method(name="ORT static", recipe="ort-static"),
    Method(name="ORT dynamic", recipe="ort-dynamic"),
    Method(name="optimum static", recipe="optimum-static", home=OPTIMUM),
    Method(name="optimum dynamic", recipe="optimum-dynamic", home=OPTIMUM),
    Method(name="NNCF", recipe="nncf-onnx", home=NNCF),
    Method(name="NNCF", recipe="nncf-openvino", home=NNCF, engines=OPENVINO),
)


class Contest:
    """All forms of one tower."""

    def __init__(self, case: Case, homes: dict[str, Path], reasons: dict[str, str]) -> None:
        self._case, self._homes, self._reasons = case, homes, reasons
        self.rows: dict[str, Row] = {}
        self.entrants: dict[str, Entrant] = {}
        self._reference: FloatArray | None = None

    def enter(self, name: str, model: Path, form: str, **where: str | Path) -> Row:
        """Judge a form, and let it race if it runs."""
        case, entrant = self._case, self._case.entrant(name, model, form, **where)
        row = Row(model=f"{case.name}_{case.tower}", form=name, megabytes=size_mb(model))
        try:
            found = case.embed(entrant, form)
        except EngineError as error:
            row = replace(row, why=f"does not run: {error}")
        else:
            if self._reference is None:
                self._reference = found
            records = case.judge(found, self._reference)
            row = replace(row, r1=case.r1(found), records=() if name == PLAIN_FP32 else records)
            self.entrants[name] = entrant
        self.rows[name] = row
        return row

    def ours(self, sizes: Sizes) -> str:
        """Enter what EdgeCLIP makes; return why that."""
        case = self._case
        self.enter(PLAIN_FP32, case.plain, PLAIN)
        self.enter(OUR_FP32, case.task.graph.path, OURS)
        config, why = chosen_config(case, sizes)
        default = default_config("int8", case.task.device)
        chosen = case.write(config, "chosen")
        self.enter(CHOSEN, chosen, OURS)
        if config != default:
            self.enter(DEFAULT, case.write(default, "default"), OURS)
        self.entrants[AGAIN] = case.entrant(AGAIN, chosen, OURS)
        if NNCF in self._homes:
            for words, engine in OPENVINO:
                self.enter(f"ours{words}", chosen, OURS, engine=engine, python=self._homes[NNCF])
        return why

    def others(self, method: Method) -> None:
        """Enter what a method makes of the plain export; if that is good, of our graph too."""
        case = self._case
        made = self._made(method, case.plain, PLAIN)
        if any(row.passed for row in made):
            self._made(method, case.task.graph.path, OURS)

    def _made(self, method: Method, source: Path, form: str) -> list[Row]:
        case, home = self._case, self._homes.get(method.home)
        names = [
            f"{method.name}{' on our graph' if form == OURS else ''}{words}"
            for words, _ in method.engines
        ]
        target = case.scratch / f"{method.recipe}-{form}{method.suffix}"
        try:
            if home is None:
                raise EngineError(self._reasons[method.home])
            make(method.recipe, source, target, case.rows("calibration", form), home)
        except EngineError as error:
            row = Row(model=f"{case.name}_{case.tower}", form=names[0], why=f"not made: {error}")
            self.rows[names[0]] = row
            return []
        return [
            self.enter(name, target, form, engine=engine, python=home)
            for name, (_, engine) in zip(names, method.engines, strict=True)
        ]

    def run(self, effort: Effort, threads: int) -> tuple[list[Row], list[Bar]]:
        """Time all; rows in their order, and how ours compares with the others."""
        raced = race(list(self.entrants.values()), effort, threads=threads)
        rows = [
            row.timed(raced, PLAIN_FP32, threads) if row.form in self.entrants else row
            for row in self.rows.values()
        ]
        noise = max(1.0, raced.ratio(AGAIN, CHOSEN).high)
        bars = []
        for row in rows:
            held = self.entrants.get(row.form)
            ours = row.form in (PLAIN_FP32, OUR_FP32, CHOSEN, DEFAULT)
            if ours or held is None or held.engine != "onnxruntime" or not row.passed:
                continue
            ratio = raced.ratio(CHOSEN, row.form)
            words = row.form.lower().replace(",", "").split()
            name = "_".join((row.model, "ours_over", *words))
            bars.append(
                Bar(name=name, value=ratio.high, direction="<=", bound=noise, interval=ratio)
            )
        return rows, bars


def homes(work: Path, *, quick: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """The environments' interpreters, and why others are not there."""
    found, reasons = {HERE: Path(sys.executable)}, {}
    for name, requirements in REQUIREMENTS.items():
        if quick:
            reasons[name] = "not asked for"
            continue
        try:
            found[name] = environment(work / name, requirements).python
        except InstallError as error:
            reasons[name] = str(error)
    return found, reasons


def towers(work: Path, *, quick: bool) -> Iterator[tuple[str, DualEncoder, Tower]]:
    """What is quantized."""
    student = kept_student()
    yield "student", student, "image"
    yield "student", student, "text"
    if not quick:
        yield VIT_8M.name, grown(VIT_8M, work), "image"


def main() -> int:
    """Quantize by all, judge, time, print tables, write the figures."""
    parser = options(__doc__ or "")
    build = Path(__file__).parents[2] / "build" / "quantizers"
    parser.add_argument("--work", type=Path, default=build, help="where others are installed")
    args = parser.parse_args()
    work, sizes = args.work.resolve(), QUICK if args.quick else FULL
    effort = Effort(sets=2, rounds=5) if args.quick else Effort(sets=5, rounds=24)
    work.mkdir(parents=True, exist_ok=True)
    found_homes, reasons = homes(work, quick=args.quick)
    rows: list[Row] = []
    bars: list[Bar] = []
    whys: dict[str, str] = {}
    for name, dual, tower in towers(work, quick=args.quick):
        part = "quick" if args.quick else "others"
        folder = work / "cases" / part / f"{name}-{tower}"
        with tempfile.TemporaryDirectory() as scratch:
            device = load_device("this-machine")
            case = open_case(name, dual, tower, device, sizes, folder=folder, scratch=Path(scratch))
            contest = Contest(case, found_homes, reasons)
            whys[f"{name}_{tower}"] = contest.ours(sizes)
            for method in METHODS:
                contest.others(method)
            mine, held = contest.run(effort, 1)
        print_tower(f"{name}, {tower} tower; ours: {whys[f'{name}_{tower}']}", mine)
        bars += [*gate_bars(next(row for row in mine if row.form == CHOSEN)), *held]
        rows += mine
    return finish_with(rows, whys, bars, args.out)


def print_tower(title: str, rows: Sequence[Row]) -> None:
    """Both tables of one tower."""
    print(f"\n{title}")
    print_speed(rows)
    print_quality(rows)
    sys.stdout.flush()


def finish_with(
    rows: Sequence[Row], whys: dict[str, str], bars: Sequence[Bar], out: Path | None
) -> int:
    """Write the figures, rows among them; the exit status."""
    status = finish(bars, out)
    if out is not None:
        record = json.loads(out.read_text(encoding="utf-8"))
        record |= {"requirements": REQUIREMENTS, "chosen": whys}
        record["rows"] = [asdict(row) for row in rows]
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
