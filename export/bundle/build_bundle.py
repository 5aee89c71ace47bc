"""The whole way from a student to a verified bundle, one function for each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.precision_candidates import (
    Passes,
    PrecisionCandidates,
    evaluate_candidates,
    export_fp32,
    export_interchange,
    qat_fallback,
    quantize_towers,
)
from edgeclip.export.bundle.write_bundle import (
    BuildRecipe,
    write_golden,
    write_labels,
    write_manifest,
)
from edgeclip.export.bundle.write_engines import write_engines
from edgeclip.export.gates.gates import GateOutcome, data_record, describe_missed, raise_if_missed
from edgeclip.export.gates.judge_precisions import TowerEmbeddings, describe_pairing, judge_together
from edgeclip.export.gates.select_precision import SelectedPrecision, select_precision
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, tower_inputs
from edgeclip.export.graph.graph_io import graph_files
from edgeclip.export.graph.label_head import add_label_head
from edgeclip.export.graph.to_onnx import STANDARD
from edgeclip.export.graph.tune_passes import PassOutcome, tune_tower
from edgeclip.export.parity.torch_parity import check_parity, explain_parity
from edgeclip.export.quantizing.quantization_file import apply_searched
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.engine_records import EngineRecord
from edgeclip.runtime.bundle.files import atomic_directory
from edgeclip.runtime.spec import Precision, Tower

Progress = Callable[[str], None]
Tuned = tuple[tuple[Tower, PassOutcome], ...]

_UNFAITHFUL = "The graph does not compute what the student does in torch: please report this"
_TOO_COARSE = "Train the student longer, or do not ask for what misses its gates"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltBundle:
    """A bundle that was written, and what was measured on the way.

    Attributes:
        bundle: the bundle, opened.
        judged: all gates that were checked, those missed by a left-out precision included.
        left_out: a line for each precision that a search had no use for, and for each gate because
            of which one was left out.
        choices: the precision that each tower ships in, why, and its measurements.
        tuned: what came of each rewrite that was tried on a tower's graph.
        says: what came of int8 where it missed a gate, or what might help.
    """

    bundle: Bundle
    judged: tuple[GateOutcome, ...]
    left_out: tuple[str, ...]
    choices: tuple[SelectedPrecision, ...]
    tuned: Tuned
    says: str = ""


def build_bundle(
    plan: BundlePlan,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress = lambda line: None,
) -> BuiltBundle:
    """Export, quantize, judge, measure and write a bundle; it exists whole or not at all.

    Args:
        plan: what goes in.
        out: the directory to make.
        replace: allow `out` to be a bundle already.
        progress: called with a line for a person before each step.

    Raises:
        GateError: fp32 does not agree with torch, or a precision that was asked for misses
            its gates; nothing is written.
        InputError: `out` exists and may not be replaced, or a picture cannot be read.
        ExportError: the student cannot be exported.
    """
    with atomic_directory(out, replace=replace) as folder:
        graphs, tuned = _export(plan, folder, progress)
        parity = _compare(plan, folder, graphs, progress)
        graphs += _quantize(plan, folder, progress)
        made = _judge(plan, graphs, tuned, progress)
        graphs = _drop(plan, made)
        _add_heads(plan, graphs)
        choices = _choose(plan, graphs, progress)
        choices, mixed = check_mixed_precisions(choices, made.embeddings, plan)
        engines = _build_engines(plan, folder, graphs, choices, progress)
        judged = (*parity, *made.verdict.judged, *mixed)
        progress("writing the bundle")
        _write_rest(plan, folder, graphs, judged, choices, engines, made)
    return BuiltBundle(
        bundle=Bundle.open(out),
        judged=judged,
        left_out=(*plan.unused, *made.verdict.left_out),
        choices=choices,
        tuned=tuned,
        says=made.says,
    )


def _export(
    plan: BundlePlan, folder: Path, progress: Progress
) -> tuple[tuple[TowerGraph, ...], Tuned]:
    """Write both towers in fp32: as they were searched, or in the form fastest on this machine."""
    progress("exporting both towers to ONNX")
    graphs = export_fp32(plan.student, folder, plan.form)
    tuned: list[tuple[Tower, PassOutcome]] = []
    for graph in (item for item in graphs if item.tower in plan.towers):
        if graph.tower in plan.searched:
            apply_searched(graph, plan.searched[graph.tower])
        elif plan.workload is not None:
            progress(f"trying what makes the {graph.tower} tower's graph faster")
            found = tune_tower(plan.student, graph, plan.runner, plan.test)
            tuned += [(graph.tower, outcome) for outcome in found]
    return graphs, tuple(tuned)


def _compare(
    plan: BundlePlan, folder: Path, graphs: Sequence[TowerGraph], progress: Progress
) -> tuple[GateOutcome, ...]:
    """Hold all fp32 graphs against torch, the one for other runtimes too."""
    named = [(graph.subject, graph) for graph in graphs]
    if plan.form.pixels != STANDARD.pixels:
        named.append(("image fp32 for others", export_interchange(plan.student, folder)))
    progress("comparing them with torch")
    parity: list[GateOutcome] = []
    for subject, graph in named:
        embed = graph_embedder(graph, plan.student.spec.image, plan.runner)
        found = check_parity(plan.student, graph.tower, embed, plan.test, plan.bounds["fp32"])
        parity += [GateOutcome(subject, record) for record in found]
    _refuse_unfaithful(plan, graphs, parity)
    return tuple(parity)


def _quantize(plan: BundlePlan, folder: Path, progress: Progress) -> tuple[TowerGraph, ...]:
    """Make the other precisions of the fp32 graphs."""
    if len(plan.wanted) > 1:
        progress(f"making {' and '.join(plan.wanted[1:])}; calibrating on {plan.calibration.name}")
    return quantize_towers(
        plan.student,
        folder,
        plan.configs,
        pixels=plan.form.pixels,
        calibration=plan.calibration,
        device=plan.device,
    )


def _refuse_unfaithful(
    plan: BundlePlan, graphs: Sequence[TowerGraph], parity: Sequence[GateOutcome]
) -> None:
    """Stop if an fp32 graph differs from torch, and say at which node it begins to."""
    found = [
        f"{graph.subject}: {explain_parity(plan.student, graph, plan.test, plan.runner, plan.form)}"
        for graph in graphs
        if describe_missed(item for item in parity if item.subject == graph.subject)
    ]
    raise_if_missed(parity, "; ".join([*found, _UNFAITHFUL]))


def _judge(
    plan: BundlePlan, graphs: Sequence[TowerGraph], tuned: Tuned, progress: Progress
) -> PrecisionCandidates:
    """Hold every precision against fp32 on the test pairs, and mend int8 if that is allowed."""
    progress(f"embedding {plan.test.name} in {', '.join(plan.wanted)}")
    made = evaluate_candidates(plan, graphs, plan.configs)
    made = qat_fallback(plan, made, _passes(plan, tuned), progress)
    if plan.precisions is not None:
        require_asked_precisions(made)
    return made


def require_asked_precisions(made: PrecisionCandidates) -> None:
    """Stop if a precision that was asked for misses its gates.

    Raises:
        GateError: names them, and ends in what might help.
    """
    remarks = map(str, made.verdict.remarks)
    says = [made.says] if made.says else []
    raise_if_missed(made.verdict.judged, "; ".join([_TOO_COARSE, *remarks, *says]))


def _passes(plan: BundlePlan, tuned: Tuned) -> Passes:
    """The rewrites that the fp32 graphs have."""
    kept = {tower: item.passes for tower, item in plan.searched.items()}
    for tower, outcome in tuned:
        if outcome.kept:
            kept[tower] = (*kept.get(tower, ()), outcome.name)
    return kept


def _drop(plan: BundlePlan, made: PrecisionCandidates) -> tuple[TowerGraph, ...]:
    """Delete the graphs that missed their gates, and those of a tower that nobody asked for."""
    kept = []
    for graph in made.graphs:
        good = graph.precision == "fp32" or (graph.tower, graph.precision) in made.verdict.kept
        if good and graph.tower in plan.towers:
            kept.append(graph)
        else:
            for file in graph_files(graph.path):
                file.unlink()
    return tuple(kept)


def _add_heads(plan: BundlePlan, graphs: Sequence[TowerGraph]) -> None:
    if plan.label_head is None:
        return
    for graph in graphs:
        if graph.tower == "image":
            labels = plan.labels[plan.label_head]
            add_label_head(graph.path, labels, plan.student.spec.logit_scale)


def _choose(
    plan: BundlePlan, graphs: Sequence[TowerGraph], progress: Progress
) -> tuple[SelectedPrecision, ...]:
    """Time the precisions of each tower against each other, if this machine is the device."""
    if plan.workload is None:
        return tuple(_unmeasured(plan, tower, graphs) for tower in plan.towers)
    choices = []
    for tower in plan.towers:
        progress(f"timing the {tower} tower in every precision")
        embedders = {
            graph.precision: graph_embedder(graph, plan.student.spec.image, plan.runner)
            for graph in graphs
            if graph.tower == tower
        }
        spec, tokenizer = plan.student.spec, plan.student.text_tokenizer
        first = next(tower_inputs(plan.test, tower, spec, tokenizer, count=1))
        choices.append(select_precision(tower, embedders, first, plan.workload))
    return tuple(choices)


def _unmeasured(plan: BundlePlan, tower: Tower, graphs: Sequence[TowerGraph]) -> SelectedPrecision:
    """What to ship to a device that is not at hand: fp32, or fp16 where a GPU runs it.

    int8 and fp8 are for the device's own measurement to choose: they are not always faster.
    """
    precision: Precision = "fp32"
    kept = {graph.precision for graph in graphs if graph.tower == tower}
    if not plan.device.on_cpu and "fp16" in kept:
        precision = "fp16"
    why = f"not measured: {plan.device.name} is not this machine"
    return SelectedPrecision(tower=tower, precision=precision, why=why)


def _build_engines(
    plan: BundlePlan,
    folder: Path,
    graphs: Sequence[TowerGraph],
    choices: Sequence[SelectedPrecision],
    progress: Progress,
) -> tuple[EngineRecord, ...]:
    """Build the engines of what the device will choose from: all but fp32, if there is more."""
    chosen = _chosen(choices)
    wanted = [
        graph for graph in graphs if graph.precision != "fp32" or chosen[graph.tower] == "fp32"
    ]
    length = plan.student.spec.text.context_length
    return write_engines(folder, wanted, plan.device, length, progress)


def check_mixed_precisions(
    choices: tuple[SelectedPrecision, ...], embeddings: TowerEmbeddings, plan: BundlePlan
) -> tuple[tuple[SelectedPrecision, ...], tuple[GateOutcome, ...]]:
    """Judge a mixed choice, which no gate has seen together yet; fall back to fp32 if it fails.

    Returns the choices and, for a mixed one, its gate.
    """
    chosen = _chosen(choices)
    if len(set(chosen.values())) == 1:
        return choices, ()
    others = set(chosen.values()) - {"fp32"}
    bounds = max((plan.bounds[item] for item in others), key=lambda item: item.r1_loss)
    data = data_record(plan.test)
    judged = judge_together(embeddings, chosen, bounds, describe_pairing(chosen), data)
    if judged.record.passed:
        return choices, (judged,)
    why = f"the precisions that are fastest lose {judged.record.value:.2f} points R@1 together"
    return tuple(replace(item, precision="fp32", why=why) for item in choices), ()


def _write_rest(
    plan: BundlePlan,
    folder: Path,
    graphs: Sequence[TowerGraph],
    judged: Sequence[GateOutcome],
    choices: Sequence[SelectedPrecision],
    engines: tuple[EngineRecord, ...],
    made: PrecisionCandidates,
) -> None:
    """Write all but the towers, the manifest last."""
    data = f"tested on {plan.test.name}; calibrated on {plan.calibration.name}"
    plan.student.save_settings(folder, texts=plan.text_tower)
    write_labels(folder, plan.labels)
    write_golden(plan.student, folder, graphs, plan.test, plan.runner)
    write_manifest(
        plan.student,
        folder,
        graphs,
        space=plan.space,
        judged=[item for item in judged if item.record.passed],
        choices=choices,
        engine=plan.runner.engine,
        making=BuildRecipe(configs=made.configs, device=plan.device, tuned=made.tuned),
        form=plan.form,
        engines=engines,
        label_head=plan.label_head,
        data=f"{data}; {made.note}" if made.note else data,
        origin=plan.origin,
        remarks=made.verdict.remarks,
    )


def _chosen(choices: Sequence[SelectedPrecision]) -> dict[Tower, Precision]:
    return {choice.tower: choice.precision for choice in choices}
