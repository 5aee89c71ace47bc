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
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import load_graph, save_graph, sha256_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.graph_passes import PASSES
from edgeclip.export.quantizing.quantization_file import FILE_NAME, TowerQuantization
from edgeclip.export.to_onnx import export_tower
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.tune_tower import tune_tower
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.spec import Tower


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPasses(JsonRecord):
    """Which rewrites made a graph faster.

    Attributes:
        graph: `sha256_graph` of what the exporter wrote.
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
    plain, note = sha256_graph(graph.path), folder / f"{tower}-passes.json"
    try:
        known = KeptPasses.load(note)
    except ConfigError:
        known = KeptPasses(graph="", passes=())
    if known.graph == plain:
        apply_passes(graph.path, known.passes)
        return SearchedGraph(graph=graph, passes=known.passes)
    outcomes = tune_tower(student, graph, device, sample)
    kept = tuple(outcome.name for outcome in outcomes if outcome.kept)
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


def apply_searched(graph: TowerGraph, found: TowerQuantization) -> None:
    """Rewrite a tower, as the exporter wrote it, into the graph that was searched.

    Raises:
        ConfigError: that gives another graph.
        ExportError: see `apply_passes`.
    """
    apply_passes(graph.path, found.passes)
    if sha256_graph(graph.path) != found.graph:
        raise ConfigError(
            f"the {graph.tower} tower is not the one that was searched for {FILE_NAME}: the "
            "student, an option of the export (such as --patch-features) or a package is another; "
            "search again with `edgeclip quantize`"
        )
