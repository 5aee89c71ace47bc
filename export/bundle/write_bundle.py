"""Write a bundle's settings, label sets, golden embeddings and manifest beside its graphs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.export.bundle.add_to_bundle import file_records
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.gates.gates import GateOutcome, without_folders
from edgeclip.export.gates.select_precision import SelectedPrecision
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder
from edgeclip.export.graph.graph_io import data_path
from edgeclip.export.quantizing.config import Config, describe, needs_vnni
from edgeclip.runtime.bundle.bundle import Expected, Golden
from edgeclip.runtime.bundle.engine_records import EngineRecord
from edgeclip.runtime.bundle.files import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    labels_path,
)
from edgeclip.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    GateRemark,
    Manifest,
    Provenance,
    Recipe,
    ReducedForm,
    TowerFile,
    TowerManifest,
)
from edgeclip.runtime.bundle.reduction import BASIS_NAME
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import Precision, Tower

_GOLDEN_PAIRS = 8
# How far an embedding's value may be off on another machine: rounding differs between
# processors, and in int8 a step of an activation can fall to the other side.
_GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "int8": 3e-2, "fp8": 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecipe:
    """How each graph of a bundle was made from the fp32 graph of its tower.

    Attributes:
        configs: the quantization config of each graph.
        device: the device that the graphs were made for.
        finetuned: towers whose int8 graph comes from a student that was fine-tuned for it.
    """

    configs: Mapping[tuple[Tower, Precision], Config]
    device: DeviceProfile
    finetuned: tuple[Tower, ...] = ()

    def recipe(self, graph: TowerGraph) -> Recipe | None:
        """Return the manifest's record of how a graph was made; None for fp32."""
        config = self.configs.get((graph.tower, graph.precision))
        if config is None:
            return None
        finetuned = graph.precision == "int8" and graph.tower in self.finetuned
        return Recipe(
            says=describe(config) + (", fine-tuned for it" if finetuned else ""),
            config=json.loads(json.dumps(asdict(config))),  # lists, as a reader finds them
        )

    def needs_vnni(self, graph: TowerGraph) -> bool:
        """Tell whether a graph is only right on CPUs with int8 dot products.

        A config that was searched on a CPU without them was judged with its overflows.
        """
        config = self.configs.get((graph.tower, graph.precision))
        return config is not None and self.device.vnni and needs_vnni(config)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundleContents:
    """The graphs that a bundle ships, and what its manifest records about them.

    Attributes:
        graphs: the files that lie in the bundle's folder already.
        gates: the gates that hold.
        selected: for each tower, the precision that it ships in.
        engines: prebuilt engines.
        recipe: how the graphs were made.
        gate_remarks: gates that were not judged, or on too little data.
        reduced: the forms of reduced embeddings that the bundle gives.
        provenance_note: about a fine-tune for int8, for the provenance.
    """

    graphs: tuple[TowerGraph, ...]
    gates: tuple[GateOutcome, ...]
    selected: tuple[SelectedPrecision, ...]
    engines: tuple[EngineRecord, ...]
    recipe: BuildRecipe
    gate_remarks: tuple[GateRemark, ...] = ()
    reduced: tuple[ReducedForm, ...] = ()
    provenance_note: str = ""


def write_bundle(plan: BundlePlan, folder: Path, contents: BundleContents) -> None:
    """Write everything but the graphs and engines, the manifest last."""
    plan.student.save_settings(folder, texts=plan.text_tower)
    for name, label_set in plan.labels.items():
        label_set.save(folder / labels_path(name))
    if contents.reduced and plan.student.basis is not None:
        plan.student.basis.save(folder / BASIS_NAME)
    write_golden(plan, folder, contents.graphs)
    write_manifest(plan, folder, contents)


def write_golden(plan: BundlePlan, folder: Path, graphs: tuple[TowerGraph, ...]) -> None:
    """Write `golden.npz`: a few test pairs, and the embeddings of each graph for them.

    Token ids come from the bundle's own tokenizer file, so that the file is tested as well.
    Without a text tower among `graphs` there are no texts.
    """
    spec, test = plan.student.spec, plan.test
    pairs = [test[index] for index in range(min(_GOLDEN_PAIRS, len(test)))]
    pixels = crop_batch([pair.image for pair in pairs], spec.image)
    texts: tuple[str, ...] = ()
    ids = np.zeros((0, spec.text.context_length), np.int64)
    if any(graph.tower == "text" for graph in graphs):
        tokenizer = TextTokenizer.from_file(folder / TOKENIZER_NAME, spec.text)
        texts = _short_enough([str(pair.caption) for pair in pairs], tokenizer)
        ids = tokenizer.encode(texts)
    expected = []
    for graph in graphs:
        embed = graph_embedder(graph, spec.image, plan.judging_device)
        embeddings = embed(pixels if graph.tower == "image" else ids)
        expected.append(Expected(graph.tower, graph.precision, embeddings.astype(np.float32)))
    golden = Golden(pixels=pixels, texts=texts, input_ids=ids, expected=tuple(expected))
    golden.save(folder / GOLDEN_NAME)


def _short_enough(texts: list[str], tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Keep the texts that need no cutting; an empty one is always short enough."""
    counts = tokenizer.token_counts(texts)
    limit = tokenizer.spec.context_length
    kept = [text for text, count in zip(texts, counts, strict=True) if count <= limit]
    return tuple(kept) or ("",)


def write_manifest(plan: BundlePlan, folder: Path, contents: BundleContents) -> None:
    """Write `edgeclip.json` after all other files: it lists each with size and hash."""
    machine = detect_machine()
    measured = any(item.measurements for item in contents.selected)
    data = f"tested on {plan.test.name}; calibrated on {plan.calibration.name}"
    if contents.provenance_note:
        data += f"; {contents.provenance_note}"
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=plan.origin.name,
        space=plan.space,
        spec=plan.student.spec,
        towers=tuple(_tower_manifest(plan, folder, contents, item) for item in contents.selected),
        gates=tuple(item.record for item in contents.gates if item.subject == "bundle"),
        measured_on=f"{machine.cpu}, {plan.judging_device.engine}" if measured else "",
        provenance=Provenance(
            teacher=without_folders(plan.origin.teacher),
            student=without_folders(plan.origin.student),
            data=without_folders(data),
            command=without_folders(plan.origin.command),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=machine.packages,
        ),
        licence=plan.origin.licence,
        files=file_records(folder),
        patch_features=plan.form.patch_features,
        label_head=plan.label_head,
        engines=contents.engines,
        remarks=contents.gate_remarks,
        reduced=contents.reduced,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _tower_manifest(
    plan: BundlePlan, folder: Path, contents: BundleContents, selected: SelectedPrecision
) -> TowerManifest:
    """Return the manifest's record of one tower and its files."""
    files = []
    for graph in contents.graphs:
        if graph.tower != selected.tower:
            continue
        data = data_path(graph.path)
        files.append(
            TowerFile(
                path=graph.path.relative_to(folder).as_posix(),
                precision=graph.precision,
                pixels=graph.pixels,
                batch=plan.form.batch,
                data_path=data.relative_to(folder).as_posix() if data.is_file() else None,
                gates=tuple(
                    item.record for item in contents.gates if item.subject == graph.subject
                ),
                latency_ms=selected.latency_ms(graph.precision),
                golden_tolerance=_GOLDEN_TOLERANCE[graph.precision],
                needs_vnni=contents.recipe.needs_vnni(graph),
                recipe=contents.recipe.recipe(graph),
            )
        )
    return TowerManifest(selected.tower, selected.precision, tuple(files))
