from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import calibration_images
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.activation_ranges import Method, Ranging, activation_bounds

Make = Callable[..., Source]


def test_bounds_are_the_largest_absolute_values(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make
) -> None:
    data = calibration_images(blobs(20), clip.spec.image)
    bounds = activation_bounds(clip_towers.image, data)
    model = onnx.load(clip_towers.image)
    name = next(n.output[0] for n in model.graph.node if n.op_type == "LayerNormalization")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    seen = [
        np.abs(session.run([name], {"pixel_values": data.batch(index)})[0]).max()
        for index in range(data.count)
    ]
    assert data.count == 2
    assert bounds[name] == pytest.approx(max(seen), rel=1e-5)
    assert bounds["pixel_values"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_other_methods_cut_off_what_is_rare(
    method: Method,
    clip: DualEncoder,
    clip_towers: TowerPaths,
    blobs: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = calibration_images(blobs(20), clip.spec.image)
    extremes = activation_bounds(clip_towers.image, data)
    cut = activation_bounds(
        clip_towers.image, data, Ranging(method=method, percentile=99), ("MatMul",)
    )
    assert cut
    assert all(cut[name] <= extremes[name] * 1.001 for name in cut)
    assert any(cut[name] < extremes[name] * 0.97 for name in cut)
    assert capsys.readouterr().out == ""


def test_weights_may_lie_in_a_second_file(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    data = calibration_images(blobs(4), clip.spec.image)
    save_graph(load_graph(clip_towers.image), tmp_path / "large.onnx", limit=1000)
    assert activation_bounds(tmp_path / "large.onnx", data) == activation_bounds(
        clip_towers.image, data
    )


@pytest.mark.parametrize("percentile", [50, 101, float("nan")])
def test_a_percentile_that_is_none_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile must be"):
        Ranging(percentile=percentile)
