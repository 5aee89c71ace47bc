import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgeclip.profiles.measure import benchmark_worker
from edgeclip.profiles.measure.benchmark_worker import NAME, TOKENS, WIDTH, yardstick_candidate

GRAPH = Path(benchmark_worker.__file__).with_name("graphs") / "yardstick.onnx"


def test_another_graph_would_need_another_name() -> None:
    digest = hashlib.sha256(GRAPH.read_bytes()).hexdigest()
    assert {NAME: digest[:16]} == {"transformer-layer-1": "cdbd997c8c993e75"}


@pytest.mark.parametrize("threads", [1, 2])
def test_it_runs_in_any_batch_and_always_gives_the_same(threads: int) -> None:
    candidate = yardstick_candidate(threads)
    assert (candidate.name, candidate.threads) == (NAME, threads)
    first, again, three = (
        np.asarray(candidate.run(candidate.make_batch(size))) for size in (1, 1, 3)
    )
    assert first.shape == (1, TOKENS, WIDTH)
    assert three.shape == (3, TOKENS, WIDTH)
    assert np.isfinite(three).all()
    assert np.array_equal(first, again)
    assert np.abs(three[:1] - first).max() < 1e-5


def test_every_product_is_computed_in_every_run_and_no_weight_is(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "trace")
    session = onnxruntime.InferenceSession(str(GRAPH), options, providers=["CPUExecutionProvider"])
    session.run(None, {"values": yardstick_candidate(1).make_batch(1)})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    # Query, key, content, projection and the two of the perceptron, and the two of attention.
    assert sum("MatMul" in op for op in ran) == 8
    assert {"LayerNormalization", "Softmax"} <= set(ran)
    assert "Erf" in ran or "Gelu" in ran
    assert not {"Range", "Sin"} & set(ran)
