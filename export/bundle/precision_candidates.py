"""Make both towers in every precision, judge each against fp32, and fine-tune if int8 fails."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.gates.gates import GateOutcome, is_missed
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
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM, export_tower
from edgeclip.export.quantizing.config import Config, StaticInt8
from edgeclip.export.quantizing.fp16 import emulated_fp16
from edgeclip.export.quantizing.qat_finetune import (
    QAT_HINT,
    QatTask,
    failing_towers,
    finetune_int8,
    without_smoothing,
)
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.spec import PixelForm, Precision, Tower

Configs = Mapping[tuple[Tower, Precision], Config]  # how each tower becomes each precision
AppliedPasses = Mapping[Tower, Sequence[str]]  # names of the graph passes of each fp32 tower


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrecisionCandidates:
    """The graphs of all precisions that were made, and the verdict of the gates on each.

    Attributes:
        graphs: both towers in fp32, then the graphs made from them.
        configs: the quantization config of each graph that was made from fp32.
        embeddings: embeddings of the test pairs, computed by each graph.
        inputs: the other inputs of the gates.
        verdict: which precisions are inside their gates.
        finetuned: towers whose int8 graph comes from a student that was fine-tuned for it.
        provenance_note: about that fine-tune, for the bundle's provenance.
        int8_hint: about int8, for the user; empty if int8 is inside its gates.
    """

    graphs: tuple[TowerGraph, ...]
    configs: Configs
    embeddings: TowerEmbeddings
    inputs: GateInputs
    verdict: PrecisionVerdict
    finetuned: tuple[Tower, ...] = ()
    provenance_note: str = ""
    int8_hint: str = ""


def export_fp32(plan: BundlePlan, folder: Path) -> tuple[TowerGraph, ...]:
    """Export both towers in fp32 into the bundle's folder.

    Raises:
        ExportError: torch cannot capture a tower.
    """
    graphs = _graphs(folder, ((tower, "fp32") for tower in TOWERS), plan.form.pixels)
    for graph in graphs:
        export_tower(plan.student, graph.tower, graph.path, plan.form)
    return graphs


def export_interchange(student: DualEncoder, folder: Path) -> TowerGraph:
    """Export the interchange graph: the image tower with float32 NCHW input, for other runtimes.

    Among these are transformers.js and optimum.

    Raises:
        ExportError: torch cannot capture the tower.
    """
    path = folder / tower_path("image", "fp32", INTERCHANGE_FORM.pixels)
    export_tower(student, "image", path, INTERCHANGE_FORM)
    return TowerGraph("image", "fp32", path, INTERCHANGE_FORM.pixels)


def quantize_towers(plan: BundlePlan, folder: Path) -> tuple[TowerGraph, ...]:
    """Make the graphs of `plan.configs`, in that order, from the fp32 files in `folder`.

    The calibration pairs give int8 and fp8 their ranges, and show fp16 which values overflow.

    Raises:
        ConfigError: the calibration source is empty or has no captions.
        ExportError: a graph is not valid, has nothing to quantize, or lacks a node that its
            config names.
    """
    configs = plan.configs
    graphs = _graphs(folder, configs, plan.form.pixels)
    # A file in the cache is named after its graph, so both towers can share the folder.
    with tempfile.TemporaryDirectory(prefix="edgeclip-ranges-") as cache:
        for graph in graphs:
            reference = folder / tower_path(graph.tower, "fp32", graph.pixels)
            data = calibration_data(
                plan.student, plan.calibration, graph.pixels, batch=plan.device.static_batch
            )
            config = configs[graph.tower, graph.precision]
            quantize_graph(reference, graph.path, config, data, cache=Path(cache))
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


def evaluate_candidates(
    plan: BundlePlan, graphs: Sequence[TowerGraph], configs: Configs
) -> PrecisionCandidates:
    """Embed the test pairs with every graph, and judge every precision against fp32.

    Where the device is not a CPU, fp16 is rounded as it will be there, see `emulated_fp16`.

    Raises:
        EngineError: a graph cannot be run.
    """
    zero_shot = plan.labelled if len(plan.wanted) > 1 else None
    with emulated_fp16(graphs, plan.device) as emulated:
        embeddings = embed_test_pairs(plan.student, emulated, plan.test, plan.judging_device)
        inputs = gate_inputs(
            plan.student,
            emulated,
            plan.test,
            zero_shot,
            embeddings,
            plan.judging_device,
            plan.clusters,
        )
    return PrecisionCandidates(
        graphs=tuple(graphs),
        configs=configs,
        embeddings=embeddings,
        inputs=inputs,
        verdict=judge_precisions(
            embeddings,
            plan.bounds,
            inputs,
            accept_undecided=plan.accept_undecided,
            looks=plan.looks,
        ),
    )


def fine_tune_failed_int8(
    plan: BundlePlan,
    candidates: PrecisionCandidates,
    passes: AppliedPasses,
) -> PrecisionCandidates:
    """Fine-tune the student for int8 and quantize it again, if int8 missed a gate.

    The int8 files are replaced if the fine-tuned student is better.

    Args:
        plan: its `qat` is the fine-tune that the user allows. Without one, `int8_hint` of the
            result says how to ask for it.
        candidates: the result of quantizing alone.
        passes: names of the graph passes that each fp32 graph has, in order.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    trainable = {
        tower: config
        for (tower, _), config in candidates.configs.items()
        if isinstance(config, StaticInt8)
    }
    missed = [
        item
        for item in candidates.verdict.judged
        if _is_int8(item) and is_missed(item.record, accept_undecided=plan.accept_undecided)
    ]
    if not failing_towers(missed, trainable):
        return candidates
    if plan.qat is None:
        return replace(candidates, int8_hint=QAT_HINT)
    task = QatTask(
        student=plan.student,
        configs=trainable,
        calibration=plan.calibration,
        test=plan.test,
        device=plan.device,
        bounds=plan.bounds["int8"],
        form=plan.form,
        passes=passes,
        zero_shot=candidates.inputs.zero_shot,
        accept_undecided=plan.accept_undecided,
        looks=plan.looks,
        clusters=plan.clusters,
    )
    result = finetune_int8(task, candidates.graphs, candidates.embeddings, plan.qat)
    if not result.tuned:
        return replace(candidates, int8_hint=result.message)
    learnt: dict[tuple[Tower, Precision], Config] = {
        (tower, "int8"): without_smoothing(trainable[tower]) for tower in result.tuned
    }
    return replace(
        evaluate_candidates(plan, candidates.graphs, {**candidates.configs, **learnt}),
        finetuned=result.tuned,
        provenance_note=result.note,
        int8_hint=result.message,
    )


def _is_int8(outcome: GateOutcome) -> bool:
    """Tell whether a gate is about int8, of one tower or of both together."""
    return outcome.subject.endswith(" int8") or outcome.record.name == "R@1 loss int8"
