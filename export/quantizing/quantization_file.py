"""Read and write `quantization.json`: the config chosen for each tower, and its fp32 graph."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import data_record
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import load_graph, save_graph, sha256_graph
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.graph.tune_passes import tune_tower
from edgeclip.export.quantizing.config import Config, default_config, precision_of, without_removed
from edgeclip.runtime.bundle.files import JsonRecord, tower_path
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Precision, Tower

FILE_NAME = "quantization.json"

_HINT = "search again with `edgeclip quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerQuantization:
    """The config chosen for a tower.

    Attributes:
        config: the choice; fp32 means that no other precision is worth shipping.
        graph: `sha256_graph` of the fp32 graph that the config's node names belong to.
        passes: names of the rewrites applied to this graph, in order.
        why: the reason for the choice.
    """

    config: Config
    graph: str
    passes: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBasis:
    """The device, machine and calibration data that the choices are valid for.

    Attributes:
        device: name of the device profile.
        machine: the processor that configs were timed on; None where none was timed.
        pairs: number of calibration pairs (of emoji scenes; a folder has its own number).
        ranges: how many of them ranges were found on; see `open_calibration`.
        calibration: sha256 of the identity of the pairs that ranges were found on.
    """

    device: str
    machine: str | None
    pairs: int
    ranges: int
    calibration: str

    @classmethod
    def of(
        cls, device: DeviceProfile, calibration: Source, *, pairs: int, ranges: int, timed: bool
    ) -> "SearchBasis":
        """Return the basis of a search on this machine with ranges found on `calibration`."""
        return cls(
            device=device.name,
            machine=detect_machine().cpu if timed else None,
            pairs=pairs,
            ranges=ranges,
            calibration=data_record(calibration).sha256,
        )

    def check(self, device: DeviceProfile, calibration: Source) -> None:
        """Check that the export uses the device, machine and calibration pairs of the search.

        Otherwise the exported graph would not be the one that was judged.

        Raises:
            ConfigError: another device or machine, or other pairs to find ranges on.
        """
        exported = SearchBasis.of(
            device,
            calibration,
            pairs=self.pairs,
            ranges=self.ranges,
            timed=self.machine is not None,
        )
        if exported.device != self.device:
            raise ConfigError(
                f"{FILE_NAME} is for the device {self.device!r}, not {device.name!r}: name that "
                f"--device, or {_HINT}"
            )
        if exported.machine != self.machine:
            raise ConfigError(
                f"{FILE_NAME} was timed on {self.machine}, and this is {exported.machine}: {_HINT} "
                "here, or name a --device for both"
            )
        if exported.calibration != self.calibration:
            raise ConfigError(
                f"{FILE_NAME} has ranges of other pairs than {calibration.name}: name the --data "
                f"that was searched with, as it was, or {_HINT}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization(JsonRecord):
    """The configs chosen for a device.

    Attributes:
        basis: what they are valid for.
        towers: the towers that were searched.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = FILE_NAME
    HINT: ClassVar[str] = _HINT

    basis: SearchBasis
    towers: Mapping[Tower, TowerQuantization]

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Read a file of this version or an older one; see `JsonRecord.from_json`."""
        # `super()` alone fails in a dataclass with slots, which is a class made anew.
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError):
            return super(Quantization, cls).from_json(
                text, source=source
            )  # which says what is wrong
        towers = data.get("towers") if isinstance(data, dict) else None
        for tower, found in towers.items() if isinstance(towers, dict) else ():
            if isinstance(found, dict) and "config" in found:
                where = f"{source}: the config of the {tower} tower"
                found["config"] = without_removed(found["config"], source=where)
        return super(Quantization, cls).from_json(json.dumps(data), source=source)

    def config_for(
        self, tower: Tower, precision: Precision, device: DeviceProfile
    ) -> Config | None:
        """Return a tower's config in a precision; None where the search chose another precision."""
        found = self.towers.get(tower)
        if found is None:
            return default_config(precision, device)
        if precision_of(found.config) == precision:
            return found.config
        return None if precision == "int8" else default_config(precision, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPasses(JsonRecord):
    """The graph rewrites that made an exported graph faster.

    Attributes:
        graph: `sha256_graph` of the exported graph.
        passes: names of the rewrites that were kept, in order.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "kept rewrites"
    HINT: ClassVar[str] = "delete it and search again"

    graph: str
    passes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedGraph:
    """A tower in fp32, and the names of the rewrites applied to it."""

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
    """Export one tower in fp32 as in a bundle; on the device itself, with the rewrites that help.

    A second run with the same student gives the same bytes: it applies the rewrites that the
    first one kept.

    Args:
        student: the model; it is put into evaluation mode.
        tower: which one.
        device: the target device.
        folder: where the graph and the names of its rewrites are kept.
        sample: pairs to try rewrites on; None where this machine is not the device.

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
        known = AppliedPasses.load(note)
    except ConfigError:
        known = AppliedPasses(graph="", passes=())
    if known.graph == plain:
        apply_passes(graph.path, known.passes)
        return SearchedGraph(graph=graph, passes=known.passes)
    outcomes = tune_tower(student, graph, device, sample)
    kept = tuple(outcome.name for outcome in outcomes if outcome.kept)
    AppliedPasses(graph=plain, passes=kept).save(note)
    return SearchedGraph(graph=graph, passes=kept)


def apply_passes(path: Path, names: Sequence[str]) -> None:
    """Apply graph rewrites by name, in order.

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


def apply_searched(graph: TowerGraph, quantization: TowerQuantization) -> None:
    """Rewrite a freshly exported tower into the graph that was searched.

    Raises:
        ConfigError: the result is another graph.
        ExportError: see `apply_passes`.
    """
    apply_passes(graph.path, quantization.passes)
    if sha256_graph(graph.path) != quantization.graph:
        raise ConfigError(
            f"the {graph.tower} tower is not the one that was searched for {FILE_NAME}: the "
            "student, an option of the export (such as --patch-features) or a package is another; "
            "search again with `edgeclip quantize`"
        )
