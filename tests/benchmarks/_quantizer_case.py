"""Forms of a tower that are judged on the same pairs and timed in a race.

Every form runs in a process of its own (`_quantizer_process.py`), one run at a time, in turns. A
set of processes lives for some rounds; then all are started anew, because how memory comes to lie
in a process makes its runs faster or slower for as long as it lives. So intervals are those of a
ratio over sets.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from _bars import Bar, at_least, say, span
from _processes import UnavailableError, last_line, run_to_end
from _quantizer_models import WORK
from graph_work import plain_graph
from numpy.typing import NDArray

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, data_record
from edgeclip.export.gates.judge_precisions import GateInputs, judge_alone
from edgeclip.export.gates.zero_shot import emoji_zero_shot
from edgeclip.export.graph.calibration import (
    CalibrationSource,
    calibration_images,
    calibration_texts,
)
from edgeclip.export.graph.embedders import TOWERS, embed_all, torch_embedder, tower_inputs
from edgeclip.export.graph.graph_io import data_path
from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, open_evaluator
from edgeclip.export.quantizing.config import Config, default_config, describe
from edgeclip.export.quantizing.quantization_file import export_searched
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.search import search
from edgeclip.export.quantizing.search_task import (
    JudgedPairs,
    SearchTask,
    search_space,
    split_calibration,
)
from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.timing_statistics import latency_of, paired_ratio
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share
from edgeclip.runtime.towers.tower_runner import tower_feed

PLAIN_FP32, OUR_FP32 = "plain fp32", "our fp32"
OURS, PLAIN = "ours", "plain"  # forms of an input
HERE = Path(sys.executable)
PROCESS = str(Path(__file__).with_name("_quantizer_process.py"))
_WARM = 0.5  # seconds
_CONTENDED = 0.1  # share of the time that a process was ready to run but had no core


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many pairs, labelled pictures, minutes of a search, and rounds in sets of processes."""

    ranges: int
    steering: int
    test: int
    labelled: int
    minutes: float | None
    sets: int
    rounds: int


FULL = Sizes(ranges=96, steering=128, test=400, labelled=200, minutes=4, sets=5, rounds=16)
# Fewer sets have no interval to speak of.
QUICK = Sizes(ranges=16, steering=32, test=60, labelled=40, minutes=None, sets=3, rounds=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A tower's file, the engine of `_quantizer_process.py` that runs it, and its inputs."""

    model: Path
    rows: Path
    engine: str = "onnxruntime"
    python: Path = HERE


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form of a tower: how good, how large, and how fast with so many threads.

    `records` are its gates on the test inputs, `r1` is that of the test pairs with the other tower
    in fp32, `ratio` the time divided by that of the plain fp32 export, `why` why it is not there.
    """

    model: str
    form: str
    records: tuple[GateRecord, ...] = ()
    r1: Interval | None = None
    megabytes: float | None = None
    threads: int = 0
    ms: Interval | None = None
    ratio: Interval | None = None
    contended: bool | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        return not self.why and all(record.passed for record in self.records)


Seconds = Mapping[str, Sequence[NDArray[np.float64]]]  # by form, one array [rounds] a set


class Contest:
    """Forms of one tower: what they are judged on, and what came of them by form.

    Graph and search are kept between runs, those of a quick run apart; inputs are written to
    `scratch`. `task` has our fp32 graph, `plain` is the plain export: all tokens through the last
    layer, float32 pixels. `entrants` are the forms that run.
    """

    def __init__(
        self, model: str, dual: DualEncoder, tower: Tower, sizes: Sizes, scratch: Path
    ) -> None:
        self.model, self._sizes, self._scratch = model, sizes, scratch
        part = "quick" if sizes.minutes is None else "full"
        self._folder = WORK / "cases" / part / f"{model.removesuffix(f'_{tower}')}-{tower}"
        self._folder.mkdir(parents=True, exist_ok=True)
        size, device = dual.image_spec.size, load_device(THIS_MACHINE)
        pairs = EmojiSource("calibration", sizes.ranges + sizes.steering, size=size, distinct=True)
        ranges, steering = split_calibration(pairs, sizes.ranges)
        test = EmojiSource("test", sizes.test, size=size, distinct=True)
        labelled = None
        if tower == "image":
            teacher = DualEncoder.load(BUILT_IN_TEACHER)
            labelled = emoji_zero_shot(teacher, count=sizes.labelled, size=size)
        self.task = SearchTask(
            student=dual,
            graph=export_searched(dual, tower, device, self._folder, sample=ranges).graph,
            device=device,
            ranges=CalibrationSource(ranges),
            steering=JudgedPairs(pairs=steering),
            test=JudgedPairs(pairs=test, zero_shot=labelled),
            workload=SEARCH_WORKLOAD,
        )
        self.plain = self._folder / "plain.onnx"
        plain_graph(dual, tower, self.plain, one_token=False)
        (self._other,) = (item for item in TOWERS if item != tower)
        inputs = tower_inputs(dual, self._other, test)
        (self._others,) = embed_all(inputs, [torch_embedder(dual, self._other)])
        self.write_rows("calibration", pairs)
        self.write_rows("test", test, *([labelled.source] if labelled else []))
        self.write_rows("single", test, count=1)
        self.rows: dict[str, Row] = {}
        self.entrants: dict[str, Entrant] = {}
        self._reference: FloatArray | None = None

    def path(self, what: str, form: str) -> Path:
        """The file with `calibration`, `test` or `single` inputs, as `form` takes them."""
        return self._scratch / f"{what}-{form}.npz"

    def write_rows(self, what: str, *sources: Source, count: int | None = None) -> None:
        """Write what the tower is given, in both forms; texts are not padded."""
        dual, tower = self.task.student, self.task.tower
        rows: dict[str, list[NDArray[Any]]] = {OURS: [], PLAIN: []}
        for batch in chain(*(tower_inputs(dual, tower, item, count=count) for item in sources)):
            (plain,) = tower_feed(batch, tower, "float32-nchw", dual.spec.image).values()
            for form, values in ((OURS, batch), (PLAIN, plain)):
                for at in range(len(values)):
                    row = values[at : at + 1]
                    if tower == "text":
                        row = row[:, : 1 + int((row[0] == dual.spec.text.eos_id).argmax())]
                    rows[form].append(row)
        for form, found in rows.items():
            np.savez(self.path(what, form), *found)

    def enter(
        self, name: str, model: Path, form: str, engine: str = "onnxruntime", python: Path = HERE
    ) -> Row:
        """Judge a form, and let it race if it runs; the first is the plain fp32 export."""
        beside = (model, data_path(model), model.with_suffix(".bin"))
        size = sum(item.stat().st_size for item in beside if item.is_file()) / 1e6
        row = Row(model=self.model, form=name, megabytes=size)
        tests = Entrant(model=model, rows=self.path("test", form), engine=engine, python=python)
        try:
            found = embed(tests, self.task.judging_device.threads)
        except UnavailableError as error:
            row = replace(row, why=f"does not run: {error}")
        else:
            if self._reference is None:
                self._reference = found
            records = () if name == PLAIN_FP32 else self._judge(found, self._reference)
            both = found[: len(self._others)], self._others
            images, texts = both if self.task.tower == "image" else both[::-1]
            r1 = estimate_share(pair_ranks(images, texts).hits(1)).interval
            row = replace(row, r1=r1, records=records)
            self.entrants[name] = replace(tests, rows=self.path("single", form))
        self.rows[name] = row
        return row

    def _judge(self, found: FloatArray, reference: FloatArray) -> tuple[GateRecord, ...]:
        """Hold embeddings of all test inputs against those of the plain export."""
        test, count, tower = self.task.test, len(self._others), self.task.tower
        inputs = GateInputs(
            data=data_record(test.pairs),
            zero_shot=test.zero_shot,
            labelled={"fp32": reference[count:], "int8": found[count:]} if test.zero_shot else None,
        )
        embeddings: dict[tuple[Tower, Precision], FloatArray] = {
            (tower, "fp32"): reference[:count],
            (tower, "int8"): found[:count],
            (self._other, "fp32"): self._others,
        }
        judged = judge_alone(tower, "int8", embeddings, DEFAULT_BOUNDS["int8"], inputs)
        return tuple(item.record for item in judged)

    def write(self, config: Config, name: str) -> Path:
        path, task, spec = self._folder / f"{name}.onnx", self.task, self.task.student.spec
        if task.graph.pixels is not None:
            data = calibration_images(task.ranges, spec.image, task.graph.pixels)
        else:
            data = calibration_texts(task.ranges, task.student.text_tokenizer)
        quantize_graph(task.graph.path, path, config, data)
        return path

    def enter_chosen(self, name: str) -> tuple[Config, str]:
        """Enter both fp32 graphs, and what our search chooses for this machine, and say why that.

        Without a search that is the default.
        """
        self.enter(PLAIN_FP32, self.plain, PLAIN)
        self.enter(OUR_FP32, self.task.graph.path, OURS)
        why = "the default, not searched"
        config: Config = default_config("int8", self.task.device)
        if self._sizes.minutes is not None:
            space = search_space(self.task.device, self.task.tower, here=True)
            with open_evaluator(self.task, self._folder / "search") as trial:
                found = search(trial, space, minutes=self._sizes.minutes, progress=say)
            config, why = found.chosen.config, f"{describe(found.chosen.config)}: {found.why}"
        self.enter(name, self.write(config, "chosen"), OURS)
        return config, why

    def race(self, threads: int) -> tuple[Seconds, list[Row]]:
        """Time all that runs, in turns; rows in the order of entering."""
        raced, contended = race(self.entrants, self._sizes, threads)
        rows = []
        for form, row in self.rows.items():
            if form in raced:
                ms = latency_of([1e3 * runs for runs in raced[form]]).p50_ms
                ratio = paired_ratio(raced[form], raced[PLAIN_FP32])
                row = replace(row, threads=threads, ms=ms, ratio=ratio, contended=contended)
            rows.append(row)
        return raced, rows


class _Process:
    def __init__(self, process: "subprocess.Popen[str]", said: Path) -> None:
        self._process, self._said = process, said
        self.ask("")

    def ask(self, line: str) -> float:
        """Send a line, or nothing, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # what it said says why
            self._process.stdin.write(line and f"{line}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UnavailableError(last_line(self._said.read_text("utf-8", "replace")))
        return float(line)

    def times(self) -> NDArray[np.float64] | None:
        """Seconds on a core and seconds of waiting for one, of all threads: [2]."""
        try:
            tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
            found = [(task / "schedstat").read_text().split()[:2] for task in tasks]
        except OSError:
            return None
        return np.asarray(np.array(found, np.float64).sum(axis=0) / 1e9)


@contextmanager
def started(entrant: Entrant, threads: int) -> Iterator[_Process]:
    """Start an engine and load its file; it ends with the block."""
    given = [entrant.engine, str(threads), str(entrant.model), str(entrant.rows)]
    command = [str(entrant.python), "-I", PROCESS, "serve", *given]
    pipe = subprocess.PIPE
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        with (
            said.open("w") as sink,
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=sink, text=True) as process,
        ):
            try:
                yield _Process(process, said)
            finally:
                process.kill()


def race(
    entrants: Mapping[str, Entrant], sizes: Sizes, threads: int
) -> tuple[Seconds, bool | None]:
    """Time all in turns; and whether other programs took the processor meanwhile."""
    seconds: dict[str, list[NDArray[np.float64]]] = {name: [] for name in entrants}
    waiting: list[float] = []
    for number in range(sizes.sets):
        order = list(entrants)[:: -1 if number % 2 else 1]
        with ExitStack() as stack:
            open_ = {name: stack.enter_context(started(entrants[name], threads)) for name in order}
            processes = [open_[name] for name in entrants]
            for process in processes:
                process.ask(f"warm {_WARM}")
            before = [process.times() for process in processes]
            found = np.zeros((sizes.rounds, len(processes)))
            for at in range(sizes.rounds):
                for place in round_order(len(processes), at):
                    found[at, place] = processes[place].ask("run")
            after = [process.times() for process in processes]
        for place, name in enumerate(entrants):
            seconds[name].append(found[:, place])
        for first, last in zip(before, after, strict=True):
            if first is not None and last is not None and last[0] > first[0]:
                ran, waited = last - first
                waiting.append(float(waited / (ran + waited)))
    return seconds, max(waiting) > _CONTENDED if waiting else None


def embed(entrant: Entrant, threads: int) -> FloatArray:
    """Embeddings of all its rows, float32 [N, dim]."""
    with tempfile.TemporaryDirectory() as folder, started(entrant, threads) as process:
        path = Path(folder) / "embeddings.npy"
        process.ask(f"embed {path}")
        return np.asarray(np.load(path), np.float32)


def make(recipe: str, source: Path, target: Path, rows: Path, python: Path) -> None:
    """Let a recipe of `_quantizer_process.py` quantize a tower."""
    given = [recipe, str(source), str(target), str(rows)]
    run_to_end([str(python), "-I", PROCESS, "make", *given], target.parent)


def gate_bars(model: str, records: Sequence[GateRecord]) -> Iterator[Bar]:
    """A bar for each gate of a form; one that is missed, if it was not judged."""
    if not records:
        yield at_least(f"{model}_judged", 0, 1)
    for item in records:
        words = item.name.replace(",", "").replace("@", "").replace("-", "_").split()
        interval = Interval(item.value, item.low, item.high)
        name = "_".join((model, *words))
        yield Bar(name, item.value, item.direction, item.bound, item.unit, interval)


def table(rows: Sequence[Row]) -> str:
    cells = [("form", "threads", "ms", "MB", "of plain", "mean cosine", "R@1", "gates", "")]
    for row in rows:
        if row.ms is None or row.ratio is None or row.r1 is None:
            cells.append((row.form, *6 * ("",), row.why, ""))
            continue
        gates = {item.name: f"{item.value:.5g}" for item in row.records}
        missed = [f"{item.name} {item.value:.4g}" for item in row.records if not item.passed]
        inside = f"missed: {', '.join(missed)}" if missed else "inside" if gates else ""
        times = (str(row.threads), f"{row.ms.value:.2f}", f"{row.megabytes:.1f}", span(row.ratio))
        marks = "contended" if row.contended else ""
        cells.append((row.form, *times, gates.get("mean cosine", ""), span(row.r1), inside, marks))
    return columns(cells)


def ran_on() -> str:
    """Which machine this is, and whether it has what makes 8-bit products fast and exact."""
    machine, without = detect_machine(), "" if load_device(THIS_MACHINE).vnni else "out"
    return f"on {machine.cpu}, {machine.cores} cores, with{without} int8 dot products (VNNI)"
