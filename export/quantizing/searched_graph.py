"""The fp32 tower that a search starts from: the same bytes in each run, and in the bundle.

Which rewrites make a graph faster is measured, so it can come out differently next time. The
names of nodes in a config belong to one graph, therefore the rewrites that were kept are
written down and applied again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.embed_pairs import tower_inputs
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import load_graph, save_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.graph_passes import PASSES
from edgeclip.export.to_onnx import STANDARD, export_tower
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.tune_graph import tune_graph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.files import sha256_file
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.tower_feed import tower_feed

_TUNED_ON = 4  # inputs, on which a rewritten graph must give what it gave before


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPasses(JsonRecord):
    """Which rewrites made a graph faster.

    Attributes:
        graph: sha256 of the file as the exporter wrote it.
        passes: names of what was kept, in order.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "kept rewrites"
    MEND: ClassVar[str] = "delete it and search again"

    graph: str
    passes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedGraph:
    """A tower in fp32, and the rewrites that it has."""

    graph: TowerGraph
    passes: tuple[str, ...]


def export_searched(
    student: DualEncoder,
    tower: Tower,
    device: DeviceProfile,
    folder: Path,
    *,
    sample: Source | None,
) -> SearchedGraph:
    """Export one tower in fp32 as a bundle has it; where this is the device, as is fastest on it.

    A second run with the same student gives the same bytes: it applies what the first one kept.

    Args:
        student: the model; it is put into evaluation mode.
        tower: which one.
        device: that it is for.
        folder: where the graph and its rewrites are kept.
        sample: pairs to try rewrites on, on this machine; None where it is not the device.

    Raises:
        ExportError: torch cannot capture the tower.
        EngineError: the graph cannot be run here.
    """
    form = GraphForm.for_device(device)
    pixels = form.pixels if tower == "image" else None
    graph = TowerGraph(tower, "fp32", folder / tower_path(tower, "fp32", pixels), pixels)
    export_tower(student, tower, graph.path, form)
    if sample is None:
        return SearchedGraph(graph=graph, passes=())
    plain, note = sha256_file(graph.path), folder / f"{tower}-passes.json"
    try:
        known = KeptPasses.load(note)
    except ConfigError:
        known = KeptPasses(graph="", passes=())
    if known.graph == plain:
        apply_passes(graph.path, known.passes)
        return SearchedGraph(graph=graph, passes=known.passes)
    kept = _tune(student, graph, device, sample)
    KeptPasses(graph=plain, passes=kept).save(note)
    return SearchedGraph(graph=graph, passes=kept)


def apply_passes(path: Path, names: Sequence[str]) -> None:
    """Rewrite a graph as `tune_graph` did when it kept these passes, in their order.

    Raises:
        ExportError: there is no such pass, or the result is not valid ONNX.
    """
    passes = {item.name: item for item in PASSES}
    for name in names:
        if name not in passes:
            raise ExportError(
                f"there is no rewrite {name!r}, only {', '.join(passes)}: search again with "
                "`edgeclip quantize`"
            )
        changed, _ = passes[name].apply(load_graph(path))
        save_graph(changed, path)


def _tune(
    student: DualEncoder, graph: TowerGraph, device: DeviceProfile, sample: Source
) -> tuple[str, ...]:
    spec, tokenizer = student.spec, student.text_tokenizer
    values = next(tower_inputs(sample, graph.tower, spec, tokenizer, count=_TUNED_ON))
    outcomes = tune_graph(
        graph.path,
        device,
        tower_feed(values, graph.tower, graph.pixels, spec.image),
        tower=graph.tower,
        # As in a bundle: what other runtimes read too is left in operators that they know.
        standard=graph.pixels in (None, STANDARD.pixels),
    )
    return tuple(outcome.name for outcome in outcomes if outcome.kept)
