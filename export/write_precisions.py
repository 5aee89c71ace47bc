"""Every tower in every precision that was asked for, as ONNX files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.calibrate import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.fp16 import write_fp16
from edgeclip.export.quantize import Int8Settings, write_int8
from edgeclip.export.to_onnx import export_tower
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle_paths import tower_path
from edgeclip.runtime.spec import Precision, Tower

TOWERS: tuple[Tower, ...] = get_args(Tower)


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """One tower in one precision: an ONNX file."""

    tower: Tower
    precision: Precision
    path: Path

    @property
    def subject(self) -> str:
        """What reports call it, such as "image int8"."""
        return f"{self.tower} {self.precision}"


def write_reference(student: DualEncoder, folder: Path) -> tuple[TowerGraph, ...]:
    """Export both towers in fp32 into a bundle's folder.

    Raises:
        ExportError: torch cannot capture a tower.
    """
    graphs = _graphs(folder, ["fp32"])
    for graph in graphs:
        export_tower(student, graph.tower, graph.path)
    return graphs


def write_others(
    student: DualEncoder,
    folder: Path,
    precisions: Sequence[Precision],
    *,
    calibration: Source,
    device: DeviceProfile,
) -> tuple[TowerGraph, ...]:
    """Make the other precisions from the fp32 files in `folder`; int8 sees `calibration`.

    Raises:
        ConfigError: the calibration source is empty or has no captions.
        ExportError: a graph that is not valid, or has nothing to quantize.
    """
    graphs = _graphs(folder, [item for item in precisions if item != "fp32"])
    settings = Int8Settings.for_device(device)
    for graph in graphs:
        reference = folder / tower_path(graph.tower, "fp32")
        if graph.precision == "fp16":
            write_fp16(reference, graph.path)
        else:
            data = _calibration(student, graph.tower, calibration)
            write_int8(reference, graph.path, data, settings)
    return graphs


def _graphs(folder: Path, precisions: Iterable[Precision]) -> tuple[TowerGraph, ...]:
    return tuple(
        TowerGraph(tower, precision, folder / tower_path(tower, precision))
        for precision in precisions
        for tower in TOWERS
    )


def _calibration(student: DualEncoder, tower: Tower, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, student.spec.image)
    return calibration_texts(source, student.text_tokenizer)
