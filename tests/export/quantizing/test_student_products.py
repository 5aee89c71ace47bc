from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.quantization_aware import fake_quantized
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.qat_finetune import norm_names, product_grids
from edgeclip.export.quantizing.quantization_file import apply_passes
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.runtime.quality.retrieval import cosines
from edgeclip.runtime.spec import Tower

Make = Callable[..., Source]
RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]

CPU = StaticInt8(symmetric=False, reduce_range=True)
CONFIGS = {
    "cpu": CPU,
    "symmetric": StaticInt8(symmetric=True),
    "one scale for each weight": replace(CPU, per_channel=False),
}


def batches(dual: DualEncoder, tower: Tower, source: Source) -> CalibrationData:
    if tower == "image":
        return calibration_images(source, dual.spec.image)
    return calibration_texts(source, dual.text_tokenizer)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("family", ["clip", "convnext"])
def test_a_fake_quantized_student_gives_what_its_int8_graph_gives(
    family: str,
    tower: Tower,
    config: StaticInt8,
    blobs: Make,
    run_graph: RunGraph,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    dual: DualEncoder = request.getfixturevalue(family)
    paths: TowerPaths = request.getfixturevalue(f"{family}_towers")
    source = paths.image if tower == "image" else paths.text
    write_config(source, tmp_path / "int8.onnx", config, batches(dual, tower, blobs(32, seed=1)))
    grids = product_grids(dual, tower, source, tmp_path / "int8.onnx", config)
    data = batches(dual, tower, blobs(40))
    module, embed = tower_module(dual, tower), getattr(dual, f"embed_{tower}")
    for index in range(data.count):
        values = data.batch(index)
        (in_int8,) = run_graph(tmp_path / "int8.onnx", values).values()
        (in_float,) = run_graph(source, values).values()
        with torch.inference_mode(), fake_quantized(dual, grids):
            as_exported = module(torch.from_numpy(values)).numpy()
            as_trained = embed(torch.from_numpy(values)).numpy()
        for imitated in (as_exported, as_trained):
            found = cosines(imitated, in_int8)
            assert found.min() > 0.999
            assert 1 - found.mean() < 0.1 * (1 - cosines(in_int8, in_float).mean())


def test_layers_are_named_whatever_became_of_their_nodes(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    data = batches(clip, "image", blobs(16))
    plain, merged = clip_towers.image, tmp_path / "merged.onnx"
    save_graph(load_graph(plain), merged)
    apply_passes(merged, ["simplify", "merge projections"])
    grids = []
    for source in (plain, merged):
        quantized = tmp_path / f"{source.stem}_int8.onnx"
        write_config(source, quantized, CPU, data)
        grids.append(product_grids(clip, "image", source, quantized, CPU))
    assert len(grids[0]) == 13
    assert grids[0].keys() == grids[1].keys()
    for name, grid in grids[0].items():
        assert grids[1][name].input.scale == pytest.approx(grid.input.scale, rel=1e-3)
        assert grid.weight.largest == 64


def test_what_stays_in_float_is_not_rounded(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    config = replace(CPU, kept=("node_MatMul_18", "node_linear_12"))
    write_config(clip_towers.image, tmp_path / "a.onnx", config, batches(clip, "image", blobs(16)))
    grids = product_grids(clip, "image", clip_towers.image, tmp_path / "a.onnx", config)
    assert len(grids) == 11
    assert "model.visual_projection" not in grids
    assert "model.vision_model.encoder.layers.0.self_attn.q_proj" not in grids
    assert "model.vision_model.encoder.layers.0.self_attn.k_proj" in grids


def test_a_graph_of_another_student_is_refused(
    clip: DualEncoder,
    legacy_clip: DualEncoder,
    convnext: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    tmp_path: Path,
) -> None:
    data = batches(clip, "image", blobs(8))
    write_config(clip_towers.image, tmp_path / "int8.onnx", CPU, data)
    with pytest.raises(ExportError, match="is no layer of the student"):
        product_grids(convnext, "image", clip_towers.image, tmp_path / "int8.onnx", CPU)
    with pytest.raises(ExportError, match="no quantized product of the image tower"):
        product_grids(clip, "image", clip_towers.image, clip_towers.image, CPU)


def test_norms_are_named_too(clip: DualEncoder, clip_towers: TowerPaths) -> None:
    # The last layer's first norm is there twice: for all tokens, and for the class token.
    nodes = [f"node_layer_norm_{number}" for number in (1, 2, 3, 4, 6)]
    layers = "model.vision_model.encoder.layers"
    assert norm_names(clip, "image", clip_towers.image, nodes) == {
        "node_layer_norm_1": f"{layers}.0.layer_norm1",
        "node_layer_norm_2": f"{layers}.0.layer_norm2",
        "node_layer_norm_3": f"{layers}.1.layer_norm1",
        "node_layer_norm_4": f"{layers}.1.layer_norm1",
        "node_layer_norm_6": "model.vision_model.post_layernorm",
    }
    with pytest.raises(ExportError, match="node_matmul is no LayerNorm"):
        norm_names(clip, "image", clip_towers.image, ["node_matmul"])
