"""Quantization-aware fine-tuning as the last resort: when quantizing alone misses a gate.

The user has to allow it, because it takes long and asks for training data. What it changes is
int8 alone: the student in float stays what it was, and everything is held against that.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.fake_quantize import ProductGrid
from edgeclip.compress.quantization_aware import fine_tune
from edgeclip.compress.sources import Source
from edgeclip.compress.teacher_cache import build_cache
from edgeclip.compress.train_loop import TrainSettings
from edgeclip.export.calibrate import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.gates import Bounds, Judged, missed
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.judge_precisions import (
    TowerEmbeddings,
    Verdict,
    embed_test,
    judge_precisions,
    judged_on,
)
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.searched_graph import apply_passes
from edgeclip.export.quantizing.smooth_student import smooth_student
from edgeclip.export.quantizing.student_products import norm_names, product_grids
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.export.to_onnx import export_tower
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.export.zero_shot import ZeroShot
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import PixelForm, Precision, Tower

HINT = "--qat-steps 300 would fine-tune the student for int8 and try again"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Task:
    """What is quantized, and what decides whether it is good.

    Attributes:
        student: the model; it is put into evaluation mode, and its weights stay.
        configs: how the towers are quantized that are.
        calibration: pairs with captions that ranges are found on.
        test: pairs with captions that the gates are measured on.
        runner: what runs the graphs.
        bounds: of the gates of int8.
        form: how the towers are captured.
        passes: names of the rewrites that the fp32 graph of a tower has.
        zero_shot: labelled pictures, if there are any.
    """

    student: DualEncoder
    configs: Mapping[Tower, StaticInt8]
    calibration: Source
    test: Source
    runner: DeviceProfile
    bounds: Bounds
    form: GraphForm
    passes: Mapping[Tower, Sequence[str]] = field(default_factory=dict)
    zero_shot: ZeroShot | None = None


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
class Attempt:
    """Quantized towers, and what the gates say.

    Attributes:
        graphs: both towers of the task's student in fp32, then those in int8.
        embeddings: of the test pairs, by each graph.
        verdict: int8 held against fp32.
    """

    graphs: tuple[TowerGraph, ...]
    embeddings: TowerEmbeddings
    verdict: Verdict

    @property
    def judged(self) -> tuple[Judged, ...]:
        """Every gate that was checked."""
        return self.verdict.judged

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return not needs_qat(item.record for item in self.judged)

    def graph(self, tower: Tower, precision: Precision) -> TowerGraph | None:
        """Return one of the graphs, if it is there."""
        found = (item for item in self.graphs if (item.tower, item.precision) == (tower, precision))
        return next(found, None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of quantizing, and of the fine-tune if there was one.

    Attributes:
        plain: quantized as it was.
        tuned: quantized after the fine-tune; None where there was none.
        chosen: the better of them.
        note: for a bundle's provenance; empty unless the fine-tune is in what was chosen.
        says: for a person; empty where quantizing alone passed.
    """

    plain: Attempt
    tuned: Attempt | None = None
    chosen: Attempt
    note: str = ""
    says: str = ""


def needs_qat(records: Iterable[GateRecord]) -> bool:
    """Tell whether a gate was missed: else a fine-tune has nothing to mend."""
    return not all(record.passed for record in records)


def quantize_or_tune(
    task: Int8Task,
    folder: Path,
    tuning: Tuning | None = None,
    *,
    plain: Attempt | None = None,
    progress: Progress = lambda line: None,
) -> Outcome:
    """Quantize; if that misses a gate and `tuning` is there, fine-tune and quantize again.

    Args:
        task: what is quantized, and what decides.
        folder: where graphs are written.
        tuning: the fine-tune that is allowed; None for none.
        plain: what quantizing gave, if that was done before.
        progress: called with a line for a person before each step.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    plain = plain or quantize(task, folder / "plain")
    if plain.passed:
        return Outcome(plain=plain, chosen=plain)
    misses = "; ".join(missed(plain.judged))
    if tuning is None:
        return Outcome(plain=plain, chosen=plain, says=f"{misses}. {HINT}")
    progress(f"fine-tuning for int8, because {misses}")
    tuned = _tune(task, plain, folder, tuning, progress)
    chosen = better(plain, tuned)
    if chosen is plain:
        says = f"{misses}. Fine-tuning for int8 made it no better, so it is left as it was"
        return Outcome(plain=plain, tuned=tuned, chosen=plain, says=says)
    note = (
        f"int8 fine-tuned for {tuning.settings.steps} steps of {tuning.settings.batch_size} on "
        f"{tuning.source.name}, because without that {misses}"
    )
    left = "; ".join(missed(tuned.judged))
    says = f"fine-tuned for int8, but {left}" if left else "fine-tuned for int8"
    return Outcome(plain=plain, tuned=tuned, chosen=tuned, note=note, says=says)


def quantize(task: Int8Task, folder: Path) -> Attempt:
    """Export both towers, quantize those that have a config, and judge them.

    Raises:
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
    """
    float_graphs = tuple(_float(task, task.student, tower, folder) for tower in TOWERS)
    graphs = [
        *float_graphs,
        *(
            _quantized(task, graph, task.configs[graph.tower], folder)
            for graph in float_graphs
            if graph.tower in task.configs
        ),
    ]
    embeddings = embed_test(task.student, graphs, task.test, task.runner)
    return _judged(task, graphs, embeddings)


def better(plain: Attempt, tuned: Attempt) -> Attempt:
    """Return the one that misses fewer gates, or misses the worst by less; if alike, `plain`."""
    return min(plain, tuned, key=_badness)


def _badness(attempt: Attempt) -> tuple[int, float]:
    records = [item.record for item in attempt.judged if not item.record.passed]
    return len(records), max(map(_excess, records), default=0.0)


def _excess(record: GateRecord) -> float:
    """What is lost, as a share of what may be: 1 - cos over 1 - bound, or points over points."""
    if record.direction == "<=":
        return record.value / record.bound if record.bound > 0 else float("inf")
    return (1 - record.value) / (1 - record.bound) if record.bound < 1 else float("inf")


def _tune(
    task: Int8Task, plain: Attempt, folder: Path, tuning: Tuning, progress: Progress
) -> Attempt:
    """Fine-tune the towers that missed a gate, and quantize them again."""
    towers = missed_towers(plain, task.configs)
    configs = {tower: plainly(task.configs[tower]) for tower in towers}
    student = _copy(task.student)
    grids: dict[str, ProductGrid] = {}
    for tower in towers:
        _smooth(task, student, tower, plain)
        start = _float(task, student, tower, folder / "start")
        rounded = _quantized(task, start, configs[tower], folder / "start")
        grids |= product_grids(student, tower, start.path, rounded.path, configs[tower])
    progress(f"embedding {tuning.source.name} with the student as it is")
    cache = build_cache(task.student, tuning.source, tuning.folder / "cache")
    fine_tune(
        student,
        cache,
        tuning.source,
        grids=grids,
        settings=tuning.settings,
        out=tuning.folder / "run",
    )
    student.save(tuning.folder / "student")
    progress("quantizing and judging the fine-tuned student")
    return _requantized(task, plain, student, configs, folder / "tuned")


def missed_towers(attempt: Attempt, quantized: Iterable[Tower]) -> tuple[Tower, ...]:
    """Return the quantized towers that miss a gate; if none does alone, all of them."""
    mine = tuple(quantized)
    misses = {item.subject for item in attempt.judged if not item.record.passed}
    return tuple(tower for tower in mine if f"{tower} int8" in misses) or mine


def plainly(config: StaticInt8) -> StaticInt8:
    """Return a config without what would move weights or biases off those that were trained."""
    return replace(config, smoothing=(), equalised=False, bias_corrected=False)


def _smooth(task: Int8Task, student: DualEncoder, tower: Tower, plain: Attempt) -> None:
    """Smooth the student itself, where the config smooths its graph."""
    alphas = dict(task.configs[tower].smoothing)
    graph = plain.graph(tower, "fp32")
    if not alphas or graph is None:
        return
    names = norm_names(student, tower, graph.path, tuple(alphas))
    by_norm: dict[str, float] = {}
    for node, name in names.items():  # the last layer's norm may be two nodes
        by_norm[name] = max(alphas[node], by_norm.get(name, 0.0))
    standard = None if tower == "text" else GraphForm().pixels
    smooth_student(student, tower, by_norm, _calibration(task, tower, standard))


def _requantized(
    task: Int8Task,
    plain: Attempt,
    student: DualEncoder,
    configs: Mapping[Tower, StaticInt8],
    folder: Path,
) -> Attempt:
    """Quantize some towers of another student, and hold them against the task's own in fp32."""
    made = [
        _quantized(task, _float(task, student, tower, folder / "float"), config, folder)
        for tower, config in configs.items()
    ]
    kept = [
        graph for graph in plain.graphs if graph.precision == "fp32" or graph.tower not in configs
    ]
    embeddings = dict(plain.embeddings) | embed_test(student, made, task.test, task.runner)
    return _judged(task, [*kept, *made], embeddings)


def _judged(task: Int8Task, graphs: Sequence[TowerGraph], embeddings: TowerEmbeddings) -> Attempt:
    on = judged_on(task.student, graphs, task.test, task.zero_shot, embeddings, task.runner)
    verdict = judge_precisions(embeddings, {"int8": task.bounds}, on)
    return Attempt(graphs=tuple(graphs), embeddings=embeddings, verdict=verdict)


def _float(task: Int8Task, student: DualEncoder, tower: Tower, folder: Path) -> TowerGraph:
    pixels = task.form.pixels if tower == "image" else None
    path = folder / tower_path(tower, "fp32", pixels)
    export_tower(student, tower, path, task.form)
    apply_passes(path, task.passes.get(tower, ()))
    return TowerGraph(tower, "fp32", path, pixels)


def _quantized(task: Int8Task, graph: TowerGraph, config: StaticInt8, folder: Path) -> TowerGraph:
    target = folder / tower_path(graph.tower, "int8", graph.pixels)
    write_config(graph.path, target, config, _calibration(task, graph.tower, graph.pixels))
    return replace(graph, precision="int8", path=target)


def _calibration(task: Int8Task, tower: Tower, pixels: PixelForm | None) -> CalibrationData:
    batch = task.form.batch
    if pixels is not None:
        return calibration_images(task.calibration, task.student.spec.image, pixels, batch=batch)
    return calibration_texts(task.calibration, task.student.text_tokenizer, batch=batch)


def _copy(student: DualEncoder) -> DualEncoder:
    """Return a copy to train, whose embeddings stay in the student's space."""
    model = copy.deepcopy(student.model)
    return DualEncoder(model, student.image_spec, student.tokenizer, space=student.space).eval()
