"""What a bundle holds beside its towers: settings, tokenizer, golden inputs, manifest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.choose import TowerChoice
from edgeclip.export.embed_pairs import graph_embedder
from edgeclip.export.file_records import file_records
from edgeclip.export.gates import Judged
from edgeclip.export.graph import data_path
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.quantizing.config import (
    Config,
    describe,
    needs_vnni,
)
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import detect_machine
from edgeclip.runtime.bundle_paths import GOLDEN_NAME, MANIFEST_NAME, TOKENIZER_NAME, labels_path
from edgeclip.runtime.engine_key import EngineRecord
from edgeclip.runtime.golden import Expected, Golden
from edgeclip.runtime.labels import LabelSet
from edgeclip.runtime.manifest import (
    SCHEMA_VERSION,
    GateRemark,
    Manifest,
    Provenance,
    Recipe,
    TowerFile,
    TowerManifest,
)
from edgeclip.runtime.preprocess import crop_batch
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tokenize_text import TextTokenizer

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
class Making:
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
    judged: Sequence[Judged],
    choices: Sequence[TowerChoice],
    engine: str,
    making: Making,
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
    choice: TowerChoice,
    folder: Path,
    graphs: Sequence[TowerGraph],
    judged: Sequence[Judged],
    making: Making,
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
