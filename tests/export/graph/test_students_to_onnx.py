"""Students with merged patches, bytes and a factorised table are exported as torch runs them."""

from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData, calibration_images
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, torch_embedder
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Precision, Tower
from tests.export.conftest import Blobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student(clip: DualEncoder) -> DualEncoder:
    shape = StudentShape(
        image_layers=2,
        text_layers=1,
        merge_after=(1,),
        text_tokenizer="bytes",
        token_rank=6,
    )
    return new_student(clip, shape).eval()


def test_merged_patches_in_fp32_and_int8(
    student: DualEncoder, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    size = student.image_spec.size
    pixels = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    wanted = torch_embedder(student, "image")(pixels)
    form = GraphForm()
    fp32, int8 = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export_tower(student, "image", fp32, form)
    data: CalibrationData = calibration_images(Blobs(8), student.spec.image)
    quantize_graph(fp32, int8, StaticInt8(symmetric=False, reduce_range=True), data)
    cases: tuple[tuple[Path, Precision, float], ...] = (
        (fp32, "fp32", 1 - 1e-6),
        (int8, "int8", 0.98),
    )
    for path, precision, least in cases:
        graph = TowerGraph("image", precision, path, form.pixels)
        embed = graph_embedder(graph, student.image_spec, cpu_device)
        found = embed(pixels)
        assert cosines(found, wanted).min() > least
        alone = np.concatenate([embed(pixels[place : place + 1]) for place in range(5)])
        assert np.abs(alone - found).max() < 1e-6


def test_bytes_and_a_factorised_table(
    student: DualEncoder, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    tower: Tower = "text"
    path = tmp_path / "text.onnx"
    export_tower(student, tower, path)
    ids = student.text_tokenizer.encode(["blue", "rot und grün", "赤", ""])
    embed = graph_embedder(TowerGraph(tower, "fp32", path, None), student.image_spec, cpu_device)
    assert np.abs(embed(ids) - torch_embedder(student, tower)(ids)).max() < 1e-5
