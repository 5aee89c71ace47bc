"""Write a bundle, whole or not at all; add a file to one that exists."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import GateOutcome
from edgeclip.export.gates.select_precision import SelectedPrecision
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder
from edgeclip.export.graph.graph_io import data_path
from edgeclip.export.graph.to_onnx import GraphForm
from edgeclip.export.quantizing.config import Config, describe, needs_vnni
from edgeclip.runtime.bundle.bundle import Bundle, Expected, Golden
from edgeclip.runtime.bundle.engine_records import EngineRecord
from edgeclip.runtime.bundle.files import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    atomic_file,
    check_path,
    labels_path,
    sha256_file,
)
from edgeclip.runtime.bundle.labels import LabelSet
from edgeclip.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    GateRemark,
    Manifest,
    Provenance,
    Recipe,
    TowerFile,
    TowerManifest,
)
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import Precision, Tower


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Path, size and hash of every file in a folder and its subfolders, sorted."""
    return tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


_GOLDEN_PAIRS = 8
# How far an embedding's value may be off on another machine: rounding differs between
# processors, and in int8 a step of an activation can fall to the other side.
_GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "int8": 3e-2, "fp8": 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a bundle comes from, in the words of the person who makes it.

    Attributes:
        name: what people call the model.
        teacher: the teacher's path or hub id.
        student: the student's path.
        command: what was typed.
        licence: SPDX identifier or a sentence.
    """

    name: str
    teacher: str
    student: str
    command: str
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecipe:
    """How the graphs of a bundle were made of those in fp32.

    Attributes:
        configs: of each.
        device: that they were made for.
        tuned: towers whose int8 is of a student that was fine-tuned for it.
    """

    configs: Mapping[tuple[Tower, Precision], Config]
    device: DeviceProfile
    tuned: tuple[Tower, ...] = ()

    def recipe(self, graph: TowerGraph) -> Recipe | None:
        """What the manifest says of a graph; None for fp32."""
        config = self.configs.get((graph.tower, graph.precision))
        if config is None:
            return None
        tuned = graph.precision == "int8" and graph.tower in self.tuned
        return Recipe(
            says=describe(config) + (", fine-tuned for it" if tuned else ""),
            config=json.loads(json.dumps(asdict(config))),  # lists, as a reader finds them
        )

    def needs_vnni(self, graph: TowerGraph) -> bool:
        """Whether it is only right on CPUs with int8 dot products.

        What a search chose on a CPU without them was judged with its overflows.
        """
        config = self.configs.get((graph.tower, graph.precision))
        return config is not None and self.device.vnni and needs_vnni(config)


def write_golden(
    student: DualEncoder,
    folder: Path,
    graphs: Sequence[TowerGraph],
    test: Source,
    device: DeviceProfile,
) -> None:
    """Write `golden.npz`: a few test pairs, and what every graph makes of them.

    Token ids come from the bundle's own tokenizer file, so that it is tried as well. Where
    `graphs` hold no text tower, there are no texts.
    """
    spec = student.spec
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
        embed = graph_embedder(graph, spec.image, device)
        embeddings = embed(pixels if graph.tower == "image" else ids)
        expected.append(Expected(graph.tower, graph.precision, embeddings.astype(np.float32)))
    golden = Golden(pixels=pixels, texts=texts, input_ids=ids, expected=tuple(expected))
    golden.save(folder / GOLDEN_NAME)


def write_labels(folder: Path, labels: Mapping[str, LabelSet]) -> None:
    """Write label sets as `labels/NAME.npz`."""
    for name, label_set in labels.items():
        label_set.save(folder / labels_path(name))


def write_manifest(
    student: DualEncoder,
    folder: Path,
    graphs: Sequence[TowerGraph],
    *,
    space: str,
    judged: Sequence[GateOutcome],
    choices: Sequence[SelectedPrecision],
    engine: str,
    making: BuildRecipe,
    form: GraphForm,
    engines: tuple[EngineRecord, ...],
    label_head: str | None,
    data: str,
    origin: Origin,
    remarks: tuple[GateRemark, ...] = (),
) -> None:
    """Write `edgeclip.json`, last of all: it lists every file with size and hash."""
    measured = any(choice.measurements for choice in choices)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=origin.name,
        space=space,
        spec=student.spec,
        towers=tuple(
            _tower_manifest(choice, folder, graphs, judged, making, form.batch)
            for choice in choices
        ),
        gates=tuple(item.record for item in judged if item.subject == "bundle"),
        measured_on=f"{detect_machine().cpu}, {engine}" if measured else "",
        provenance=_provenance(origin, data),
        licence=origin.licence,
        files=file_records(folder),
        patch_features=form.patch_features,
        label_head=label_head,
        engines=engines,
        remarks=remarks,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _tower_manifest(
    choice: SelectedPrecision,
    folder: Path,
    graphs: Sequence[TowerGraph],
    judged: Sequence[GateOutcome],
    making: BuildRecipe,
    batch: int | None,
) -> TowerManifest:
    files = tuple(
        TowerFile(
            path=graph.path.relative_to(folder).as_posix(),
            precision=graph.precision,
            pixels=graph.pixels,
            batch=batch,
            data_path=_data_path(graph.path, folder),
            gates=tuple(item.record for item in judged if item.subject == graph.subject),
            latency_ms=choice.latency_ms(graph.precision),
            golden_tolerance=_GOLDEN_TOLERANCE[graph.precision],
            needs_vnni=making.needs_vnni(graph),
            recipe=making.recipe(graph),
        )
        for graph in graphs
        if graph.tower == choice.tower
    )
    return TowerManifest(choice.tower, choice.precision, files)


def _data_path(graph: Path, folder: Path) -> str | None:
    data = data_path(graph)
    return data.relative_to(folder).as_posix() if data.is_file() else None


def _provenance(origin: Origin, data: str) -> Provenance:
    return Provenance(
        teacher=origin.teacher,
        student=origin.student,
        data=data,
        command=origin.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=detect_machine().packages,
    )


def _short_enough(texts: list[str], tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Keep the texts that need no cutting; an empty one is always short enough."""
    counts = tokenizer.token_counts(texts)
    limit = tokenizer.spec.context_length
    kept = [text for text, count in zip(texts, counts, strict=True) if count <= limit]
    return tuple(kept) or ("",)


# A file that is not declared yet may lie anywhere but here, see `Bundle.open`.
_CLOSED_FOLDERS = ("onnx", "engines", "labels")


def add_to_bundle(bundle: Bundle, path: str, content: bytes) -> Bundle:
    """Write a file into a bundle, or replace it, and open the bundle again.

    The manifest drops the file, the file is replaced, the manifest takes it up: each is one
    rename, and after each the bundle can be opened. A run that was killed in between leaves it
    without the file. Weights are not copied.

    Args:
        bundle: an opened bundle.
        path: of the file inside it, not among towers, engines and labels.
        content: its bytes.

    Raises:
        ExportError: the path is not one for an added file, or the bundle was changed since it
            was opened.
        InputError: the file cannot be written.
        BundleError: the bundle that came of it is not sound.
    """
    try:
        check_path(path)
        others = replace(bundle.manifest, files=_without(bundle.manifest, path))
    except ValueError as error:
        raise ExportError(f"{path} cannot be added to a bundle: {error}") from None
    if path.split("/")[0] in _CLOSED_FOLDERS:
        raise ExportError(f"{path} lies among towers, engines or labels: export them instead")
    _refuse_changed(bundle)
    if others != bundle.manifest:
        _write_manifest(bundle, others)
    with atomic_file(bundle.path / path) as temporary:
        temporary.write_bytes(content)
    record = FileRecord(path, len(content), hashlib.sha256(content).hexdigest())
    files = tuple(sorted((*others.files, record), key=lambda file: file.path))
    _write_manifest(bundle, replace(others, files=files))
    return Bundle.open(bundle.path)


def _without(manifest: Manifest, path: str) -> tuple[FileRecord, ...]:
    return tuple(file for file in manifest.files if file.path != path)


def _refuse_changed(bundle: Bundle) -> None:
    now = Bundle.open(bundle.path, check_hashes=False).manifest
    if now != bundle.manifest:
        raise ExportError(f"{bundle.path} was changed meanwhile: try again")


def _write_manifest(bundle: Bundle, manifest: Manifest) -> None:
    with atomic_file(bundle.path / MANIFEST_NAME) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
