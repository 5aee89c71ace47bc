"""`quantization.json`: the config chosen for each tower, and the fp32 graph it was chosen on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import data_record
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import load_graph, save_graph, sha256_graph
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.graph.tune_passes import tune_tower
from edgeclip.export.quantizing.config import Config, default_config, precision_of
from edgeclip.runtime.bundle.files import JsonRecord, tower_path
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Precision, Tower

FILE_NAME = "quantization.json"

_MEND = "search again with `edgeclip quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerQuantization:
    """What was chosen for a tower.

    Attributes:
        config: the choice; fp32 says that nothing else is worth shipping.
        graph: `sha256_graph` of the fp32 graph that its names of nodes belong to.
        passes: rewrites that this graph has, in order.
        why: it and no other.
    """

    config: Config
    graph: str
    passes: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBasis:
    """What the choices hold for.

    Attributes:
        device: name of its profile.
        machine: the processor that configs were timed on; None where none was timed.
        pairs: how many calibration pairs were asked for (of emoji scenes; a folder has its own).
        ranges: on how many of them ranges were to be found; see `open_calibration`.
        calibration: sha256 of the identity of the pairs that ranges were found on.
    """

    device: str
    machine: str | None
    pairs: int
    ranges: int
    calibration: str

    @classmethod
    def of(
        cls, device: DeviceProfile, found: Source, *, pairs: int, ranges: int, timed: bool
    ) -> "SearchBasis":
        """Return that of a search with ranges found on `found`, on this machine."""
        return cls(
            device=device.name,
            machine=detect_machine().cpu if timed else None,
            pairs=pairs,
            ranges=ranges,
            calibration=data_record(found).sha256,
        )

    def check(self, device: DeviceProfile, found: Source) -> None:
        """Refuse what was not searched: what is made of it would not be what was judged.

        Raises:
            ConfigError: another device or machine, or other pairs to find ranges on.
        """
        asked = SearchBasis.of(
            device, found, pairs=self.pairs, ranges=self.ranges, timed=self.machine is not None
        )
        if asked.device != self.device:
            raise ConfigError(
                f"{FILE_NAME} is for the device {self.device!r}, not {device.name!r}: name that "
                f"--device, or {_MEND}"
            )
        if asked.machine != self.machine:
            raise ConfigError(
                f"{FILE_NAME} was timed on {self.machine}, and this is {asked.machine}: {_MEND} "
                "here, or name a --device for both"
            )
        if asked.calibration != self.calibration:
            raise ConfigError(
                f"{FILE_NAME} has ranges of other pairs than {found.name}: name the --data that "
                f"was searched with, as it was, or {_MEND}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization(JsonRecord):
    """The choices for a device.

    Attributes:
        basis: what they hold for.
        towers: those that were searched.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = FILE_NAME
    MEND: ClassVar[str] = _MEND

    basis: SearchBasis
    towers: Mapping[Tower, TowerQuantization]

    def config_for(
        self, tower: Tower, precision: Precision, device: DeviceProfile
    ) -> Config | None:
        """What a tower is turned into in a precision; None where the search found no use in it."""
        found = self.towers.get(tower)
        if found is None:
            return default_config(precision, device)
        if precision_of(found.config) == precision:
            return found.config
        return None if precision == "int8" else default_config(precision, device)


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
