"""Towers of a bundle in every precision: written, judged, and fine-tuned where int8 misses."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.gates.gates import GateOutcome
from edgeclip.export.gates.judge_precisions import (
    GateInputs,
    PrecisionVerdict,
    TowerEmbeddings,
    embed_test_pairs,
    gate_inputs,
    judge_precisions,
)
from edgeclip.export.graph.calibration import calibration_data
from edgeclip.export.graph.embedders import TOWERS, TowerGraph
from edgeclip.export.graph.to_onnx import STANDARD, GraphForm, export_tower
from edgeclip.export.quantizing.config import Config, StaticInt8
from edgeclip.export.quantizing.fp16 import stored_in_half
from edgeclip.export.quantizing.qat_finetune import (
    HINT,
    Int8Task,
    missed_towers,
    plainly,
    tune_int8,
)
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import PixelForm, Precision, Tower

Configs = Mapping[tuple[Tower, Precision], Config]  # how each tower becomes each precision


def export_fp32(student: DualEncoder, folder: Path, form: GraphForm) -> tuple[TowerGraph, ...]:
    """Export both towers in fp32 into a bundle's folder.

    Raises:
        ExportError: torch cannot capture a tower.
    """
    graphs = _graphs(folder, ((tower, "fp32") for tower in TOWERS), form.pixels)
    for graph in graphs:
        export_tower(student, graph.tower, graph.path, form)
    return graphs


def export_interchange(student: DualEncoder, folder: Path) -> TowerGraph:
    """Export the image tower in the customary form, for transformers.js, optimum and others.

    Raises:
        ExportError: torch cannot capture the tower.
    """
    path = folder / tower_path("image", "fp32", STANDARD.pixels)
    export_tower(student, "image", path, STANDARD)
    return TowerGraph("image", "fp32", path, STANDARD.pixels)


def quantize_towers(
    student: DualEncoder,
    folder: Path,
    configs: Configs,
    *,
    pixels: PixelForm,
    calibration: Source,
    device: DeviceProfile,
) -> tuple[TowerGraph, ...]:
    """Make the other precisions, in the order of `configs`, from the fp32 files in `folder`.

    `calibration` shows int8 and fp8 their ranges, and fp16 what is too large for it.

    Raises:
        ConfigError: the calibration source is empty or has no captions.
        ExportError: a graph that is not valid, has nothing to quantize, or lacks a node that
            its config names.
    """
    graphs = _graphs(folder, configs, pixels)
    # A file there is named after its graph, so both towers can share the folder.
    with tempfile.TemporaryDirectory(prefix="edgeclip-ranges-") as cache:
        for graph in graphs:
            reference = folder / tower_path(graph.tower, "fp32", graph.pixels)
            data = calibration_data(student, calibration, graph.pixels, batch=device.static_batch)
            config = configs[graph.tower, graph.precision]
            write_config(reference, graph.path, config, data, cache=Path(cache))
    return graphs


def _graphs(
    folder: Path, wanted: Iterable[tuple[Tower, Precision]], pixels: PixelForm
) -> tuple[TowerGraph, ...]:
    forms: dict[Tower, PixelForm | None] = {"image": pixels, "text": None}
    return tuple(
        TowerGraph(tower, precision, folder / tower_path(tower, precision, form), form)
        for tower, precision in wanted
        for form in [forms[tower]]
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrecisionCandidates:
    """What was made, before anything is left out.

    Attributes:
        graphs: both towers in fp32, then what was made of them.
        configs: of those that were made of fp32.
        embeddings: of the test pairs, by each graph.
        on: what else they were judged on.
        verdict: every precision held against fp32.
        tuned: towers whose int8 is of a student that was fine-tuned for it.
        note: of that fine-tune, for the bundle's provenance.
        says: what came of int8, for a person; empty where it is as it should be.
    """

    graphs: tuple[TowerGraph, ...]
    configs: Configs
    embeddings: TowerEmbeddings
    on: GateInputs
    verdict: PrecisionVerdict
    tuned: tuple[Tower, ...] = ()
    note: str = ""
    says: str = ""


def evaluate_candidates(
    plan: BundlePlan, graphs: Sequence[TowerGraph], configs: Configs
) -> PrecisionCandidates:
    """Embed the test pairs with every graph, and hold every precision against fp32.

    Where the device is no CPU, fp16 is rounded as it will be there, see `stored_in_half`.

    Raises:
        EngineError: a graph cannot be run.
    """
    zero_shot = plan.labelled if len(plan.wanted) > 1 else None
    with stored_in_half(graphs, plan.device) as shown:
        embeddings = embed_test_pairs(plan.student, shown, plan.test, plan.runner)
        on = gate_inputs(plan.student, shown, plan.test, zero_shot, embeddings, plan.runner)
    return PrecisionCandidates(
        graphs=tuple(graphs),
        configs=configs,
        embeddings=embeddings,
        on=on,
        verdict=judge_precisions(embeddings, plan.bounds, on),
    )


Passes = Mapping[Tower, Sequence[str]]
Progress = Callable[[str], None]


def qat_fallback(
    plan: BundlePlan,
    made: PrecisionCandidates,
    passes: Passes,
    progress: Progress = lambda line: None,
) -> PrecisionCandidates:
    """Fine-tune the student for int8 and quantize it again, if int8 missed a gate.

    Files in int8 are replaced where that is better.

    Args:
        plan: its `tuning` is the fine-tune that is allowed; without one, what comes back says
            how to ask for it.
        made: what quantizing alone gave.
        passes: names of the rewrites that the fp32 graph of a tower has, in order.
        progress: called with a line for a person before each step.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    configs = _static(made)
    if not missed_towers(filter(_of_int8, made.verdict.judged), configs):
        return made
    if plan.tuning is None:
        return replace(made, says=HINT)
    task = Int8Task(
        student=plan.student,
        configs=configs,
        calibration=plan.calibration,
        test=plan.test,
        device=plan.device,
        bounds=plan.bounds["int8"],
        form=plan.form,
        passes=passes,
        zero_shot=made.on.zero_shot,
    )
    outcome = tune_int8(task, made.graphs, made.embeddings, plan.tuning, progress)
    if not outcome.tuned:
        return replace(made, says=outcome.says)
    learnt: dict[tuple[Tower, Precision], Config] = {
        (tower, "int8"): plainly(configs[tower]) for tower in outcome.tuned
    }
    return replace(
        evaluate_candidates(plan, made.graphs, {**made.configs, **learnt}),
        tuned=outcome.tuned,
        note=outcome.note,
        says=outcome.says,
    )


def _static(made: PrecisionCandidates) -> dict[Tower, StaticInt8]:
    """The configs that can be learnt for."""
    return {
        tower: config
        for (tower, _), config in made.configs.items()
        if isinstance(config, StaticInt8)
    }


def _of_int8(judged: GateOutcome) -> bool:
    """Whether a gate is of int8: of a tower alone, or of both together."""
    return judged.subject.endswith(" int8") or judged.record.name == "R@1 loss int8"
