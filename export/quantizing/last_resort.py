"""Quantization-aware fine-tuning as the last resort: when quantizing alone misses a gate.

The user has to allow it, because it takes long and asks for training data. What it changes is
int8 alone: the student in float stays what it was, and everything is held against that.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.fake_quantize import ProductGrid
from edgeclip.compress.quantization_aware import fine_tune
from edgeclip.compress.sources import Source
from edgeclip.compress.teacher_cache import build_cache
from edgeclip.compress.train_loop import TrainSettings
from edgeclip.export.calibrate import calibration_data
from edgeclip.export.embed_pairs import runner_of
from edgeclip.export.gates import Bounds, Judged, missed
from edgeclip.export.graph import load_graph, save_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.judge_precisions import (
    TowerEmbeddings,
    embed_test,
    judge_precisions,
    judged_on,
)
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.emulate_half import stored_in_half
from edgeclip.export.quantizing.searched_graph import apply_passes
from edgeclip.export.quantizing.smooth_student import smooth_student
from edgeclip.export.quantizing.student_products import norm_names, product_grids
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.export.to_onnx import STANDARD, export_tower
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.zero_shot import ZeroShot
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import Precision, Tower

HINT = "--qat-steps 300 would fine-tune the student for int8 and try again"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Task:
    """What was quantized, and what decides whether it is good.

    Attributes:
        student: the model; it is put into evaluation mode, and its weights stay.
        configs: of the towers in static int8; no other can be fine-tuned.
        calibration: pairs with captions that ranges are found on.
        test: pairs with captions that the gates are measured on.
        device: that int8 is for.
        bounds: of the gates of int8.
        form: how the towers are captured.
        passes: names of the rewrites that the fp32 graph of a tower has, in order.
        zero_shot: labelled pictures, if there are any.
    """

    student: DualEncoder
    configs: Mapping[Tower, StaticInt8]
    calibration: Source
    test: Source
    device: DeviceProfile
    bounds: Bounds
    form: GraphForm
    passes: Mapping[Tower, Sequence[str]] = field(default_factory=dict)
    zero_shot: ZeroShot | None = None

    @property
    def runner(self) -> DeviceProfile:
        """What runs graphs while they are judged: the device, if it is a CPU."""
        return runner_of(self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuning:
    """A fine-tune that the user allows.

    Attributes:
        source: pictures with captions to train on; best those that the student was trained on.
        settings: how long and how fast; see `gentle_settings`.
        folder: for embeddings, checkpoints, log, and in the end the student in `student`. A run
            that was stopped goes on from there.
    """

    source: Source
    settings: TrainSettings
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of it.

    Attributes:
        judged: the gates of int8 as it is now.
        tuned: towers whose fine-tuned int8 is what is there now.
        note: for a bundle's provenance; empty unless `tuned`.
        says: for a person; empty where nothing had to be mended.
    """

    judged: tuple[Judged, ...]
    tuned: tuple[Tower, ...] = ()
    note: str = ""
    says: str = ""

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return not missed(self.judged)


def tune_int8(
    task: Int8Task,
    graphs: Sequence[TowerGraph],
    embeddings: TowerEmbeddings,
    tuning: Tuning,
    progress: Progress = lambda line: None,
) -> Outcome:
    """Fine-tune the towers whose int8 misses a gate, and quantize them again; others stay.

    Where that is better, it takes the place of the int8 files in `graphs`; no other is touched.
    Nothing is done, and no training data is read, if all gates hold.

    Args:
        task: what was quantized, and what decides.
        graphs: both towers in fp32, and what was made of them; other precisions do not matter.
        embeddings: of the test pairs, by each graph.
        tuning: the fine-tune that is allowed.
        progress: called with a line for a person before each step.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    before = _Attempt(
        graphs={_place(graph): graph for graph in graphs if _matters(graph.precision)},
        embeddings={place: item for place, item in embeddings.items() if _matters(place[1])},
    )
    judged = before.judge(task)
    misses = "; ".join(missed(judged))
    if not misses:
        return Outcome(judged=judged)
    towers = missed_towers(judged, task.configs)
    if not towers:
        return Outcome(judged=judged, says=f"{misses}. Only static int8 can be fine-tuned")
    progress(f"fine-tuning for int8, because {misses}")
    tuning.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="graphs-", dir=tuning.folder) as folder:
        after = _tune(task, before, towers, tuning, Path(folder), progress)
        found = after.judge(task)
        if not better(found, judged):
            says = f"{misses}. Fine-tuning for int8 made it no better, so it is left as it was"
            return Outcome(judged=judged, says=says)
        for tower in towers:
            made, place = (item.graphs[tower, "int8"].path for item in (after, before))
            save_graph(load_graph(made), place)
    note = (
        f"int8 fine-tuned for {tuning.settings.steps} steps of {tuning.settings.batch_size} on "
        f"{tuning.source.name}, because without that {misses}"
    )
    says = "; ".join(["fine-tuned for int8", *missed(found)])
    return Outcome(judged=found, tuned=towers, note=note, says=says)


def missed_towers(judged: Iterable[Judged], quantized: Iterable[Tower]) -> tuple[Tower, ...]:
    """Return which of the quantized towers miss a gate; if none does alone, all of them."""
    subjects = {item.subject for item in judged if not item.record.passed}
    if subjects == {"bundle"}:
        return tuple(quantized)
    return tuple(tower for tower in quantized if f"{tower} int8" in subjects)


def better(found: Iterable[Judged], than: Iterable[Judged]) -> bool:
    """Tell whether fewer gates are missed, or as many and the worst of them by less."""
    return _badness(found) < _badness(than)


def plainly(config: StaticInt8) -> StaticInt8:
    """Return a config without what would move weights or biases off those that were trained."""
    return replace(config, smoothing=(), equalised=False, bias_corrected=False)


def _badness(judged: Iterable[Judged]) -> tuple[int, float]:
    records = [item.record for item in judged if not item.record.passed]
    return len(records), max(map(_excess, records), default=0.0)


def _excess(record: GateRecord) -> float:
    """What is lost, as a share of what may be: 1 - cos over 1 - bound, or points over points."""
    if record.direction == "<=":
        return record.value / record.bound if record.bound > 0 else float("inf")
    return (1 - record.value) / (1 - record.bound) if record.bound < 1 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attempt:
    """The task's student in fp32, and towers in int8; with embeddings of the test pairs."""

    graphs: Mapping[tuple[Tower, Precision], TowerGraph]
    embeddings: TowerEmbeddings

    def judge(self, task: Int8Task) -> tuple[Judged, ...]:
        """Hold int8 against fp32."""
        graphs = [*self.graphs.values()]
        with stored_in_half(graphs, task.device) as shown:
            on = judged_on(
                task.student, shown, task.test, task.zero_shot, self.embeddings, task.runner
            )
        return judge_precisions(self.embeddings, {"int8": task.bounds}, on).judged


def _tune(
    task: Int8Task,
    before: _Attempt,
    towers: Sequence[Tower],
    tuning: Tuning,
    folder: Path,
    progress: Progress,
) -> _Attempt:
    """Fine-tune some towers of a copy of the student, and quantize them again."""
    student = _copy(task.student)
    grids: dict[str, ProductGrid] = {}
    for tower in towers:
        source, rounded = _start(task, before, student, tower, folder / "start")
        config = plainly(task.configs[tower])
        grids |= product_grids(student, tower, source.path, rounded.path, config)
    progress(f"embedding {tuning.source.name} with the student as it is")
    fine_tune(
        student,
        build_cache(task.student, tuning.source, tuning.folder / "cache"),
        tuning.source,
        grids=grids,
        settings=tuning.settings,
        out=tuning.folder / "run",
    )
    student.save(tuning.folder / "student")
    progress("quantizing and judging the fine-tuned student")
    made = [_quantized(task, _float(task, student, tower, folder), folder) for tower in towers]
    with stored_in_half(made, task.device) as shown:
        found = embed_test(student, shown, task.test, task.runner)
    return _Attempt(
        graphs={**before.graphs, **{_place(graph): graph for graph in made}},
        embeddings={**before.embeddings, **found},
    )


def _start(
    task: Int8Task, before: _Attempt, student: DualEncoder, tower: Tower, folder: Path
) -> tuple[TowerGraph, TowerGraph]:
    """Return the graphs, in fp32 and int8, of the student as its fine-tune begins.

    It is smoothed, in place, where its config smooths the graph.
    """
    config, source = task.configs[tower], before.graphs[tower, "fp32"]
    if config == plainly(config):
        return source, before.graphs[tower, "int8"]
    if config.smoothing:
        _smooth(task, student, source)
        source = _float(task, student, tower, folder)
    return source, _quantized(task, source, folder)


def _smooth(task: Int8Task, student: DualEncoder, graph: TowerGraph) -> None:
    """Smooth the student itself, as its config smooths a graph."""
    alphas = dict(task.configs[graph.tower].smoothing)
    names = norm_names(student, graph.tower, graph.path, tuple(alphas))
    by_norm: dict[str, float] = {}
    for node, name in names.items():  # the last layer's norm may be two nodes
        by_norm[name] = max(alphas[node], by_norm.get(name, 0.0))
    pixels = None if graph.tower == "text" else STANDARD.pixels
    data = calibration_data(task.student, task.calibration, pixels, batch=task.form.batch)
    smooth_student(student, graph.tower, by_norm, data)


def _float(task: Int8Task, student: DualEncoder, tower: Tower, folder: Path) -> TowerGraph:
    pixels = task.form.pixels if tower == "image" else None
    path = folder / tower_path(tower, "fp32", pixels)
    export_tower(student, tower, path, task.form)
    apply_passes(path, task.passes.get(tower, ()))
    return TowerGraph(tower, "fp32", path, pixels)


def _quantized(task: Int8Task, graph: TowerGraph, folder: Path) -> TowerGraph:
    """Quantize the graph of a student that is smoothed already."""
    target = folder / tower_path(graph.tower, "int8", graph.pixels)
    config = plainly(task.configs[graph.tower])
    data = calibration_data(task.student, task.calibration, graph.pixels, batch=task.form.batch)
    write_config(graph.path, target, config, data)
    return replace(graph, precision="int8", path=target)


def _copy(student: DualEncoder) -> DualEncoder:
    """Return a copy to train, whose embeddings stay in the student's space."""
    model = copy.deepcopy(student.model)
    return DualEncoder(model, student.image_spec, student.tokenizer, space=student.space).eval()


def _place(graph: TowerGraph) -> tuple[Tower, Precision]:
    return graph.tower, graph.precision


def _matters(precision: Precision) -> bool:
    return precision in ("fp32", "int8")
