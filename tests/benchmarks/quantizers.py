"""Four ways to int8 side by side: the same towers, the same pairs to calibrate and to test on.

ONNX Runtime's own quantizer with its defaults, optimum-onnx's recipe for CPUs with AVX512-VNNI,
NNCF (for OpenVINO, and its ONNX form for ONNX Runtime), and what EdgeCLIP chooses. Each of the
others gets the plain fp32 export, as its users have it; and where that stays inside the gates in
ONNX Runtime, also EdgeCLIP's fp32 graph, to tell quantizing from the work on the graph. All
calibrate on all pairs that EdgeCLIP has, those by which it chooses among them.

Every file runs in a process of its own, one run at a time, in turns, at batch 1 and with one
thread, by ONNX Runtime; NNCF's by OpenVINO compiled for latency, which computes what is not int8
in bfloat16 where the CPU has it. EdgeCLIP's file runs there too. Texts are not padded, for nobody.
Towers are both of the built-in student and the ViT of 8 M parameters of `int8_speedup.py`, whose
search is gone on with if it was run before.

Ours must be shown to be no more than 5% slower than any other in ONNX Runtime that is inside its
gates: what is held to 1.05 is the high end of the interval of the ratio of their times, so noise
speaks against us. Our file takes part twice, as a control: a race that does not find it as fast as
itself, within the same 5% either way, can tell nothing of others. OpenVINO is another engine: its
rows are told, not held. So is "ours, dynamic", `DynamicInt8` of EdgeCLIP, which the search leaves
out because an embedding then depends on what else is in its batch, however fast it is.

optimum and NNCF are installed under `--work`; `--quick` leaves them and the large tower out, and
takes some minutes. The whole takes about twenty minutes on two cores, and more on a first run,
which installs and grows.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from _bars import Bar, finish, options
from _environment import InstallError, environment
from _quantizer_case import FULL as _FULL
from _quantizer_case import (
    OURS,
    PLAIN,
    QUICK,
    Case,
    Sizes,
    chosen_config,
    open_case,
    size_mb,
)
from _quantizer_grow import BUILD, VIT_8M, grown
from _quantizer_race import QUICK_EFFORT, Effort, Entrant, make, race
from _quantizer_rows import Row, gate_bars, print_quality, print_speed, ran_on
from _quantizer_student import kept_student

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.quantizing.config import DynamicInt8, default_config
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Tower

# The test pairs are no part of what a search is known by: its points are those of int8_speedup.py.
FULL = replace(_FULL, test=300, labelled=200)
HERE, OPTIMUM, NNCF = "here", "optimum", "nncf"
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    OPTIMUM: ("optimum-onnx[onnxruntime]==0.1.0", f"torch=={version('torch').split('+')[0]}"),
    NNCF: (
        "nncf==3.4.0",
        f"openvino=={version('openvino')}",
        f"onnx=={version('onnx')}",
        f"onnxruntime=={version('onnxruntime')}",
    ),
}
PLAIN_FP32, OUR_FP32, CHOSEN, AGAIN = "plain fp32", "our fp32", "ours", "ours, the same again"
DEFAULT, DYNAMIC = "ours, not searched", "ours, dynamic"
_SLOWER = 1.05  # set beforehand: a margin that followed the noise would pay for noisy races


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How others quantize.

    Attributes:
        name: for the table.
        recipe: one of `_quantizer_process.py`.
        home: the environment that has it.
        engine: what runs the result.
    """

    name: str
    recipe: str
    home: str = HERE
    engine: str = "onnxruntime"

    @property
    def suffix(self) -> str:
        """Of its files."""
        return ".onnx" if self.engine == "onnxruntime" else ".xml"


METHODS = (
    Method(name="ORT static", recipe="ort-static"),
    Method(name="ORT dynamic", recipe="ort-dynamic"),
    Method(name="optimum static", recipe="optimum-static", home=OPTIMUM),
    Method(name="optimum dynamic", recipe="optimum-dynamic", home=OPTIMUM),
    Method(name="NNCF", recipe="nncf-onnx", home=NNCF),
    Method(name="NNCF, OpenVINO", recipe="nncf-openvino", home=NNCF, engine="openvino"),
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
        dynamic = DynamicInt8(reduce_range=not case.task.device.vnni)
        self.enter(DYNAMIC, case.write(dynamic, "dynamic"), OURS)
        self.entrants[AGAIN] = case.entrant(AGAIN, chosen, OURS)
        if NNCF in self._homes:
            where = self._homes[NNCF]
            self.enter("ours, OpenVINO", chosen, OURS, engine="openvino", python=where)
        return why

    def others(self, method: Method) -> None:
        """Enter what a method makes of the plain export; if that is good, of our graph too."""
        case = self._case
        made = self._made(method, case.plain, PLAIN)
        if made.passed and method.engine == "onnxruntime":
            self._made(method, case.task.graph.path, OURS)

    def _made(self, method: Method, source: Path, form: str) -> Row:
        case, home = self._case, self._homes.get(method.home)
        name = f"{method.name}{' on our graph' if form == OURS else ''}"
        target = case.scratch / f"{method.recipe}-{form}{method.suffix}"
        try:
            if home is None:
                raise EngineError(self._reasons[method.home])
            make(method.recipe, source, target, case.rows("calibration", form), home)
        except EngineError as error:
            row = Row(model=f"{case.name}_{case.tower}", form=name, why=f"not made: {error}")
            self.rows[name] = row
            return row
        return self.enter(name, target, form, engine=method.engine, python=home)

    def run(self, effort: Effort, threads: int) -> tuple[list[Row], list[Bar]]:
        """Time all; rows in their order, and how ours compares with the others."""
        raced = race(list(self.entrants.values()), effort, threads=threads)
        rows = [
            row.timed(raced, PLAIN_FP32, threads) if row.form in self.entrants else row
            for row in self.rows.values()
        ]
        bars = [_control(rows[0].model, raced.ratio(AGAIN, CHOSEN))]
        for row in rows:
            held = self.entrants.get(row.form)
            ours = row.form in (PLAIN_FP32, OUR_FP32, CHOSEN, DEFAULT, DYNAMIC)
            if ours or held is None or held.engine != "onnxruntime" or not row.passed:
                continue
            ratio = raced.ratio(CHOSEN, row.form)
            words = row.form.lower().replace(",", "").split()
            name = "_".join((row.model, "ours_over", *words, "high_end"))
            bars.append(
                Bar(name=name, value=ratio.high, direction="<=", bound=_SLOWER, interval=ratio)
            )
        return rows, bars


def _control(model: str, again: Interval) -> Bar:
    """The end of its interval at which the same file looks most unlike itself."""
    name, worst = f"{model}_ours_over_itself_worst_end", max(again.high, 1 / again.low)
    return Bar(name=name, value=worst, direction="<=", bound=_SLOWER, interval=again)


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
    parser.add_argument("--work", type=Path, default=BUILD, help="where others are installed")
    args = parser.parse_args()
    work, sizes = args.work.resolve(), QUICK if args.quick else FULL
    effort = QUICK_EFFORT if args.quick else Effort(sets=5, rounds=16)
    work.mkdir(parents=True, exist_ok=True)
    print(ran_on(), flush=True)
    found_homes, reasons = homes(work, quick=args.quick)
    rows: list[Row] = []
    bars: list[Bar] = []
    whys: dict[str, str] = {}
    for name, dual, tower in towers(work, quick=args.quick):
        with tempfile.TemporaryDirectory() as scratch:
            device = load_device("this-machine")
            case = open_case(name, dual, tower, device, sizes, work=work, scratch=Path(scratch))
            contest = Contest(case, found_homes, reasons)
            whys[f"{name}_{tower}"] = contest.ours(sizes)
            for method in METHODS:
                contest.others(method)
            mine, held = contest.run(effort, 1)
        print_tower(f"{name}, {tower} tower; ours: {whys[f'{name}_{tower}']}", mine)
        bars += [*gate_bars(next(row for row in mine if row.form == CHOSEN)), *held]
        rows += mine
    made = {"requirements": REQUIREMENTS, "chosen": whys}
    return finish(bars, args.out, **made, rows=[asdict(row) for row in rows])


def print_tower(title: str, rows: Sequence[Row]) -> None:
    """Both tables of one tower."""
    print(f"\n{title}")
    print_speed(rows)
    print_quality(rows)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
