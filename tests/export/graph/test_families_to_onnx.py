"""Towers of every family as graphs: ONNX Runtime computes what torch does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import graph_embedder, torch_embedder, tower_inputs
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.quantization_file import apply_passes
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Tower
from tests.compress.teachers.teacher_factory import ARCHITECTURES, FAMILIES

pytestmark = pytest.mark.slow

SOURCE = EmojiSource("test", 5, size=40)
TOWERS: tuple[Tower, ...] = ("image", "text")
# A student that has its towers beside a projection.
NARROW = StudentShape(image_heads=1, image_layers=1, text_heads=1, text_layers=2)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "student of siglip"])
def dual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    name = str(request.param).removeprefix("student of ")
    made = FAMILIES[name](tmp_path_factory.mktemp("teacher") / name)
    teacher = DualEncoder.load(made.folder)
    return teacher if name == request.param else new_student(teacher, NARROW).eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_the_module_for_export_computes_the_same(dual: DualEncoder, tower: Tower) -> None:
    values = inputs(dual, tower)
    module = tower_module(dual, tower)
    given = torch.from_numpy(values)
    if tower == "image":
        given = dual.preprocess([SOURCE[index].image for index in range(len(SOURCE))])
    with torch.inference_mode():
        found = module(given)
    np.testing.assert_allclose(found, torch_embedder(dual, tower)(values), atol=1e-6)


def test_graphs_compute_what_torch_does(
    dual: DualEncoder, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    paths = export_towers(dual, tmp_path, GraphForm(pixels="uint8-nhwc"))
    for tower in TOWERS:
        for size in (1, 5):
            values = next(tower_inputs(dual, tower, SOURCE, count=size))
            found = graph_embedder(paths.graph(tower), dual.image_spec, cpu_device)(values)
            np.testing.assert_allclose(found, torch_embedder(dual, tower)(values), atol=1e-5)
    for tower in TOWERS:
        graph = paths.graph(tower)
        apply_passes(graph.path, ("fuse attention",))
        half = replace(graph, precision="fp16", path=tmp_path / f"{tower}_fp16.onnx")
        write_fp16(graph.path, half.path)
        values = inputs(dual, tower)
        found = graph_embedder(half, dual.image_spec, cpu_device)(values)
        assert (found * torch_embedder(dual, tower)(values)).sum(-1).min() > 0.999


def inputs(dual: DualEncoder, tower: Tower) -> NDArray[Any]:
    return next(tower_inputs(dual, tower, SOURCE))
