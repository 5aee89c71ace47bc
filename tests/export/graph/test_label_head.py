from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.to_onnx import add_label_head, export_tower
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.runtime.bundle.labels import LabelSet

pytestmark = pytest.mark.slow

RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_head_gives_the_best_label_and_its_share(
    precision: str, clip: DualEncoder, tmp_path: Path, run_graph: RunGraph
) -> None:
    draw = np.random.default_rng(0)
    embeddings = draw.normal(size=(5, 16)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = LabelSet(names=tuple("abcde"), embeddings=embeddings, space="7" * 64)
    path = tmp_path / "image.onnx"
    export_tower(clip, "image", path)
    if precision == "fp16":
        write_fp16(path, path)
    pixels = draw.normal(size=(4, 3, 32, 32)).astype(np.float32)
    before = run_graph(path, pixels)["image_embeds"]
    add_label_head(path, labels, logit_scale=20.0)
    after = run_graph(path, pixels)
    np.testing.assert_array_equal(after["image_embeds"], before)
    logits = 20.0 * before @ embeddings.T
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert after["label_index"].dtype == np.int64
    np.testing.assert_array_equal(after["label_index"], logits.argmax(axis=1))
    np.testing.assert_allclose(after["label_score"], shares.max(axis=1), rtol=1e-4)
