"""Build a verified bundle from a student: export, quantize, judge, select, write."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeclip.compress.data.sources import relevance_of
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.precision_candidates import (
    AppliedPasses,
    PrecisionCandidates,
    evaluate_candidates,
    export_fp32,
    export_interchange,
    fine_tune_failed_int8,
    quantize_towers,
)
from edgeclip.export.bundle.write_bundle import BuildRecipe, BundleContents, write_bundle
from edgeclip.export.bundle.write_engines import write_engines
from edgeclip.export.gates.gates import (
    COLLAPSE_HINT,
    GateOutcome,
    data_record,
    describe_missed,
    is_missed,
    raise_if_missed,
)
from edgeclip.export.gates.judge_precisions import (
    GateInputs,
    TowerEmbeddings,
    describe_pairing,
    judge_together,
    judge_told_apart,
    pair_embeddings,
)
from edgeclip.export.gates.reduced_forms import ReducedForms, forms_of, judge_reduced
from edgeclip.export.gates.select_precision import SelectedPrecision, select_precision
from edgeclip.export.gates.teacher_agreement import TeacherAgreement, judge_agreement
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, tower_inputs
from edgeclip.export.graph.graph_io import graph_files
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM, add_label_head
from edgeclip.export.graph.tune_passes import PassOutcome, tune_tower
from edgeclip.export.parity.torch_parity import check_parity, explain_parity
from edgeclip.export.quantizing.quantization_file import apply_searched
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_directory, require_space
from edgeclip.runtime.spec import Precision, Tower

_log = logging.getLogger(__name__)

TriedPasses = tuple[tuple[Tower, PassOutcome], ...]

_PARITY_HINT = "The graph does not compute what the student does in torch: please report this"
_AGREEMENT_HINT = (
    "The student is not in its teacher's embedding space: distil it longer, on data like these, or "
    "lower the bounds (--teacher-mean-cosine, --teacher-p1-cosine, --teacher-r1-kept), or give the "
    "bundle a space of its own with --own-space"
)
_GATE_HINT = "Train the student longer, or leave out of --precisions what misses its gates"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltBundle:
    """A bundle that was written, and what was measured on the way.

    Attributes:
        bundle: the bundle, opened.
        judged: all gates that were checked, also those that a left-out precision missed or
            that towers of different precisions missed together.
        left_out: one line for each precision that was left out, with the reason.
        selected: for each tower the precision that it ships in, why, and its measurements.
        tried_passes: the outcome of each graph pass that was tried on a tower.
        int8_hint: if int8 missed a gate: what was done about it, or what might help. Else empty.
    """

    bundle: Bundle
    judged: tuple[GateOutcome, ...]
    left_out: tuple[str, ...]
    selected: tuple[SelectedPrecision, ...]
    tried_passes: TriedPasses
    int8_hint: str = ""


def build_bundle(
    plan: BundlePlan,
    out: Path,
    *,
    replace: bool = False,
) -> BuiltBundle:
    """Export, quantize, judge, measure and write a bundle; it exists whole or not at all.

    Args:
        plan: what goes into the bundle.
        out: the directory to make.
        replace: allow `out` to be a bundle already.

    Raises:
        GateError: the student is not in its teacher's space, fp32 does not agree with torch, a
            tower has collapsed, or a precision that was asked for misses its gates; nothing is
            written.
        InputError: `out` exists and may not be replaced, its disk has no room, or a picture cannot
            be read.
        ExportError: the student cannot be exported.
    """
    # fp32 twice, for the device and for others, and the other precisions, each at most as large.
    require_space(out, plan.student.weight_bytes * (1 + len(plan.wanted)))
    with atomic_directory(out, replace=replace) as folder:
        agreement = require_agreement(plan)
        _log.info("exporting both towers to ONNX ...")
        reference = export_fp32(plan, folder)
        tried = apply_passes(plan, reference)
        parity = require_parity(plan, folder, reference)

        if plan.configs:
            made = " and ".join(plan.wanted[1:])
            _log.info("making %s; calibrating on %s ...", made, plan.calibration.name)
        quantized = quantize_towers(plan, folder)
        _log.info("embedding %s in %s ...", plan.test.name, ", ".join(plan.wanted))
        candidates = evaluate_candidates(plan, (*reference, *quantized), plan.configs)
        apart, one_input = judge_told_apart(plan.student, plan.test, candidates.embeddings)
        raise_if_missed(apart, COLLAPSE_HINT)
        candidates = fine_tune_failed_int8(plan, candidates, _applied(plan, tried))
        if plan.precisions is not None:
            require_named_precisions(candidates, accept_undecided=plan.accept_undecided)

        graphs = delete_rejected(plan, candidates)
        if plan.label_head is not None:
            for graph in (item for item in graphs if item.tower == "image"):
                labels = plan.labels[plan.label_head]
                add_label_head(graph.path, labels, plan.student.spec.logit_scale)
        selected = tuple(_select(plan, tower, graphs) for tower in plan.towers)
        selected, mixed = check_mixed_precisions(selected, candidates.embeddings, plan)

        shipped = {(item.tower, item.precision) for item in selected}
        # Build an fp32 engine only if fp32 is the default of its tower; the device chooses among
        # the smaller precisions.
        wanted = [
            item for item in graphs if item.precision != "fp32" or (item.tower, "fp32") in shipped
        ]
        length = plan.student.spec.text.context_length
        engines = write_engines(folder, wanted, plan.device, length)

        reduced = judge_forms(selected, candidates.embeddings, plan)
        _log.info("writing the bundle ...")
        judged = (
            *(*parity, *apart, *agreement.judged, *candidates.verdict.judged, *mixed),
            *reduced.judged,
        )
        held = tuple(
            item
            for item in judged
            if not is_missed(item.record, accept_undecided=plan.accept_undecided)
        )
        contents = BundleContents(
            graphs=graphs,
            gates=held,
            selected=selected,
            engines=engines,
            recipe=BuildRecipe(
                configs=candidates.configs, device=plan.device, finetuned=candidates.finetuned
            ),
            gate_remarks=(
                *(*agreement.remarks, *one_input, *candidates.verdict.gate_remarks),
                *reduced.remarks,
            ),
            reduced=() if plan.student.basis is None else forms_of(plan.student.basis, held),
            provenance_note=candidates.provenance_note,
        )
        write_bundle(plan, folder, contents)
    return BuiltBundle(
        bundle=Bundle.open(out),
        judged=judged,
        left_out=(
            *(*plan.unused, *candidates.verdict.left_out),
            *describe_missed(reduced.judged, accept_undecided=plan.accept_undecided),
        ),
        selected=selected,
        tried_passes=tried,
        int8_hint=candidates.int8_hint,
    )


def require_agreement(plan: BundlePlan) -> TeacherAgreement:
    """Hold the student against the teacher of the plan; without one there is nothing to hold.

    Raises:
        GateError: it is not in the teacher's embedding space.
    """
    if plan.teacher is None:
        return TeacherAgreement(())
    _log.info("comparing the student with its teacher on %s ...", plan.test.name)
    found = judge_agreement(
        plan.student,
        plan.teacher,
        plan.test,
        plan.teacher_bounds,
        text_tower=plan.text_tower,
        looks=plan.declared_looks,
        clusters=plan.clusters,
    )
    raise_if_missed(found.judged, _AGREEMENT_HINT, accept_undecided=plan.accept_undecided)
    return found


def apply_passes(plan: BundlePlan, graphs: Sequence[TowerGraph]) -> TriedPasses:
    """Rewrite the fp32 graphs, in place, by the passes that make them faster on this machine.

    A tower of the quantization file gets the passes recorded there. For another tower they are
    timed and selected here, if this machine is the device.
    """
    tried: list[tuple[Tower, PassOutcome]] = []
    for graph in (item for item in graphs if item.tower in plan.towers):
        if graph.tower in plan.searched:
            apply_searched(graph, plan.searched[graph.tower])
        elif plan.workload is not None:
            _log.info("trying what makes the %s tower's graph faster ...", graph.tower)
            outcomes = tune_tower(plan.student, graph, plan.judging_device, plan.test)
            tried += [(graph.tower, outcome) for outcome in outcomes]
    return tuple(tried)


def _applied(plan: BundlePlan, tried: TriedPasses) -> AppliedPasses:
    """Return the names of the passes that each fp32 graph has now."""
    applied = {tower: item.passes for tower, item in plan.searched.items()}
    for tower, outcome in tried:
        if outcome.kept:
            applied[tower] = (*applied.get(tower, ()), outcome.name)
    return applied


def require_parity(
    plan: BundlePlan, folder: Path, graphs: Sequence[TowerGraph]
) -> tuple[GateOutcome, ...]:
    """Judge all fp32 graphs against torch, and the interchange graph if the device's form differs.

    Raises:
        GateError: a graph differs; the message names the first node that does.
    """
    named = [(graph.subject, graph) for graph in graphs]
    if plan.form.pixels != INTERCHANGE_FORM.pixels:
        interchange = export_interchange(plan.student, folder)
        named.append(("image fp32 for others", interchange))  # a gate's name in bundles
    _log.info("comparing them with torch ...")
    parity: list[GateOutcome] = []
    for subject, graph in named:
        embed = graph_embedder(graph, plan.student.spec.image, plan.judging_device)
        records = check_parity(plan.student, graph.tower, embed, plan.test, plan.bounds["fp32"])
        parity += [GateOutcome(subject, record) for record in records]
    causes = []
    for graph in graphs:
        if describe_missed(item for item in parity if item.subject == graph.subject):
            device, form = plan.judging_device, plan.form
            cause = explain_parity(plan.student, graph, plan.test, device, form)
            causes.append(f"{graph.subject}: {cause}")
    raise_if_missed(parity, "; ".join([*causes, _PARITY_HINT]))
    return tuple(parity)


def require_named_precisions(candidates: PrecisionCandidates, *, accept_undecided: bool) -> None:
    """Raise if any precision missed its gates; called only when the user named the precisions.

    Raises:
        GateError: names the missed gates, and ends with what might help.
    """
    verdict = candidates.verdict
    hints = [_GATE_HINT, *map(str, verdict.gate_remarks)]
    hints += [candidates.int8_hint] if candidates.int8_hint else []
    raise_if_missed(verdict.judged, "; ".join(hints), accept_undecided=accept_undecided)


def delete_rejected(plan: BundlePlan, candidates: PrecisionCandidates) -> tuple[TowerGraph, ...]:
    """Delete the graphs that missed their gates, and those of a tower the bundle does not hold."""
    kept = []
    for graph in candidates.graphs:
        place = (graph.tower, graph.precision)
        good = graph.precision == "fp32" or place in candidates.verdict.kept
        if good and graph.tower in plan.towers:
            kept.append(graph)
        else:
            for file in graph_files(graph.path):
                file.unlink()
    return tuple(kept)


def _select(plan: BundlePlan, tower: Tower, graphs: Sequence[TowerGraph]) -> SelectedPrecision:
    """Select the precision of a tower: the fastest on this machine, if it is the device.

    `plan.workload` is None if this machine is not the device. Then fp32 is selected, or fp16 for
    a GPU: int8 and fp8 are not always faster, so only the device's own measurement selects them.
    """
    mine = {graph.precision: graph for graph in graphs if graph.tower == tower}
    if plan.workload is None:
        on_gpu = not plan.device.on_cpu and "fp16" in mine
        why = f"not measured: {plan.device.name} is not this machine"
        return SelectedPrecision(tower=tower, precision="fp16" if on_gpu else "fp32", why=why)
    _log.info("timing the %s tower in every precision ...", tower)
    loaders = {
        precision: partial(graph_embedder, graph, plan.student.image_spec, plan.judging_device)
        for precision, graph in mine.items()
    }
    sample = next(tower_inputs(plan.student, tower, plan.test, count=1))
    return select_precision(tower, loaders, sample, plan.workload)


def judge_forms(
    selected: tuple[SelectedPrecision, ...], embeddings: TowerEmbeddings, plan: BundlePlan
) -> ReducedForms:
    """Judge the shorter and coarser embeddings of a student that was trained for them.

    Without a text tower in the bundle the texts are the student's in fp32.
    """
    if plan.student.basis is None or plan.student.basis.space != plan.space:
        return ReducedForms()
    _log.info("judging shorter and coarser embeddings ...")
    chosen: dict[Tower, Precision] = {item.tower: item.precision for item in selected}
    inputs = GateInputs(
        data=data_record(plan.test), relevance=relevance_of(plan.test), clusters=plan.clusters
    )
    full = pair_embeddings(embeddings, {"text": "fp32", **chosen})
    return judge_reduced(full, plan.student.basis, inputs, plan.looks)


def check_mixed_precisions(
    selected: tuple[SelectedPrecision, ...], embeddings: TowerEmbeddings, plan: BundlePlan
) -> tuple[tuple[SelectedPrecision, ...], tuple[GateOutcome, ...]]:
    """Judge towers of different precisions together, and fall back to fp32 if they fail.

    The bound is the larger of the two R@1 bounds.

    Returns:
        The precisions to ship, and the outcome of the gate if the precisions differ.
    """
    chosen: dict[Tower, Precision] = {item.tower: item.precision for item in selected}
    if len(set(chosen.values())) == 1:
        return selected, ()
    others = set(chosen.values()) - {"fp32"}
    bounds = max((plan.bounds[item] for item in others), key=lambda item: item.r1_loss)
    inputs = GateInputs(
        data=data_record(plan.test), relevance=relevance_of(plan.test), clusters=plan.clusters
    )
    judged = judge_together(
        embeddings, chosen, bounds, describe_pairing(chosen), inputs, plan.looks
    )
    if not is_missed(judged.record, accept_undecided=plan.accept_undecided):
        return selected, (judged,)
    lost = f"{judged.record.value:.2f} points R@1"
    why = f"the precisions that are fastest together lose {lost} ({judged.record.outcome})"
    fallback = tuple(dataclasses.replace(item, precision="fp32", why=why) for item in selected)
    return fallback, (judged,)
