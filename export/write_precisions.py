"""Every tower in every precision that was asked for, as ONNX files."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.calibrate import calibration_data
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.quantizing.config import Config
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.export.to_onnx import STANDARD, export_tower
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.spec import PixelForm, Precision, Tower

Configs = Mapping[tuple[Tower, Precision], Config]  # how each tower becomes each precision


def write_reference(student: DualEncoder, folder: Path, form: GraphForm) -> tuple[TowerGraph, ...]:
    """Export both towers in fp32 into a bundle's folder.

    Raises:
        ExportError: torch cannot capture a tower.
    """
    graphs = _graphs(folder, ((tower, "fp32") for tower in TOWERS), form.pixels)
    for graph in graphs:
        export_tower(student, graph.tower, graph.path, form)
    return graphs


def write_interchange(student: DualEncoder, folder: Path) -> TowerGraph:
    """Export the image tower in the customary form, for transformers.js, optimum and others.

    Raises:
        ExportError: torch cannot capture the tower.
    """
    path = folder / tower_path("image", "fp32", STANDARD.pixels)
    export_tower(student, "image", path, STANDARD)
    return TowerGraph("image", "fp32", path, STANDARD.pixels)


def write_others(
    student: DualEncoder,
    folder: Path,
    configs: Configs,
    *,
    pixels: PixelForm,
    calibration: Source,
    device: DeviceProfile,
) -> tuple[TowerGraph, ...]:
    """Make the other precisions, in the order of `configs`, from the fp32 files in `folder`.

    `calibration` shows int8 and fp8 their ranges, and fp16 what is too large for it.

    Raises:
        ConfigError: the calibration source is empty or has no captions.
        ExportError: a graph that is not valid, has nothing to quantize, or lacks a node that
            its config names.
    """
    graphs = _graphs(folder, configs, pixels)
    # A file there is named after its graph, so both towers can share the folder.
    with tempfile.TemporaryDirectory(prefix="edgeclip-ranges-") as cache:
        for graph in graphs:
            reference = folder / tower_path(graph.tower, "fp32", graph.pixels)
            data = calibration_data(student, calibration, graph.pixels, batch=device.static_batch)
            config = configs[graph.tower, graph.precision]
            write_config(reference, graph.path, config, data, cache=Path(cache))
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
