"""Every tower in every precision that was asked for, as ONNX files."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.calibrate import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.fp8 import write_fp8
from edgeclip.export.fp16 import write_fp16
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.quantize import Int8Settings, write_int8
from edgeclip.export.to_onnx import STANDARD, export_tower
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.spec import PixelForm, Precision, Tower


def write_reference(student: DualEncoder, folder: Path, form: GraphForm) -> tuple[TowerGraph, ...]:
    """Export both towers in fp32 into a bundle's folder.

    Raises:
        ExportError: torch cannot capture a tower.
    """
    graphs = _graphs(folder, ["fp32"], form.pixels)
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
    precisions: Sequence[Precision],
    *,
    pixels: PixelForm,
    calibration: Source,
    device: DeviceProfile,
    towers: Collection[Tower] = TOWERS,
) -> tuple[TowerGraph, ...]:
    """Make the other precisions of `towers` from the fp32 files in `folder`.

    `calibration` shows int8 and fp8 their ranges, and fp16 what is too large for it.

    Raises:
        ConfigError: the calibration source is empty or has no captions.
        ExportError: a graph that is not valid, or has nothing to quantize.
    """
    others = _graphs(folder, [item for item in precisions if item != "fp32"], pixels)
    graphs = tuple(graph for graph in others if graph.tower in towers)
    settings = Int8Settings.for_device(device)
    for graph in graphs:
        reference = folder / tower_path(graph.tower, "fp32", pixels)
        data = _calibration(student, graph, calibration, device.static_batch)
        if graph.precision == "fp16":
            write_fp16(reference, graph.path, data)
        elif graph.precision == "fp8":
            write_fp8(reference, graph.path, data)
        else:
            write_int8(reference, graph.path, data, settings)
    return graphs


def _graphs(
    folder: Path, precisions: Iterable[Precision], pixels: PixelForm
) -> tuple[TowerGraph, ...]:
    forms: dict[Tower, PixelForm | None] = {"image": pixels, "text": None}
    return tuple(
        TowerGraph(tower, precision, folder / tower_path(tower, precision, form), form)
        for precision in precisions
        for tower, form in forms.items()
    )


def _calibration(
    student: DualEncoder, graph: TowerGraph, source: Source, batch: int | None
) -> CalibrationData:
    if graph.pixels is not None:
        return calibration_images(source, student.spec.image, graph.pixels, batch=batch)
    return calibration_texts(source, student.text_tokenizer, batch=batch)
