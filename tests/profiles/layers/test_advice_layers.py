import dataclasses

import pytest

from edgeclip.profiles.layers.advice import amdahl
from edgeclip.runtime.device.device_profile import load_device
from tests.profiles.layers.advice_cases import (
    COMPUTING,
    CPU,
    REST,
    SLOW,
    WAITING,
    advice,
    in_precision,
    layers,
    measurement,
    node,
    only,
)


def test_products_near_the_peak_ask_for_int8() -> None:
    found = only(advice(measurement(layers=layers(COMPUTING, REST))))
    assert found.topic == "precision"
    assert "--precisions int8" in found.what
    assert found.at_most == pytest.approx(amdahl(0.8, 3))
    assert "80% of the time reaches 90%" in found.evidence


def test_products_near_the_peak_ask_for_a_smaller_model_where_int8_was_tried() -> None:
    item = dataclasses.replace(in_precision("fp32", 10.0), layers=layers(COMPUTING, REST))
    found = only(advice(item, in_precision("int8", 11.0)))
    assert found.topic == "model"
    assert found.at_most == pytest.approx(1 / 0.6)
    without = dataclasses.replace(CPU, precisions=("fp32",))
    assert only(advice(item, device=without)).topic == "model"


def test_products_far_from_the_peak_promise_nothing() -> None:
    assert advice(measurement(layers=layers(SLOW, REST))) == ()
    half = layers(COMPUTING, node(9.0, "Softmax"))
    assert advice(measurement(layers=half)) == ()


def test_an_fp32_product_in_an_int8_graph_is_no_reason_for_int8() -> None:
    item = dataclasses.replace(in_precision("int8", 10.0), layers=layers(COMPUTING, REST))
    assert only(advice(item)).topic == "model"


def test_products_that_wait_for_memory_ask_for_smaller_weights() -> None:
    found = only(advice(measurement(layers=layers(WAITING, REST))))
    assert found.topic == "precision"
    assert found.at_most == pytest.approx(amdahl(0.8, 4))
    assert "wait for memory, at up to 16 GB/s" in found.evidence
    in_int8 = dataclasses.replace(in_precision("int8", 10.0), layers=layers(WAITING, REST))
    assert advice(in_int8) == ()
    tried = dataclasses.replace(in_precision("fp32", 10.0), layers=layers(WAITING, REST))
    assert advice(tried, in_precision("int8", 11.0)) == ()


def test_a_gpu_has_half_the_weights_in_fp16() -> None:
    orin = load_device("jetson-orin-nano")
    item = measurement(layers=layers(dataclasses.replace(WAITING, op="gemm"), REST))
    found = only(advice(item, device=orin))
    assert "--precisions fp16" in found.what
    assert found.at_most == pytest.approx(amdahl(0.8, 2))


def test_what_moves_data_has_no_weights() -> None:
    moving = node(8.0, "Add", flops=10e6, moved=128e6)
    assert advice(measurement(layers=layers(moving, REST))) == ()


def test_many_short_layers() -> None:
    short = [node(0.005, "Add", 1e3, 1e4) for _ in range(40)]
    item = measurement(layers=layers(*short, node(0.1, "Softmax")))
    found = only(advice(item))
    assert found.topic == "short layers"
    assert "40 layers" in found.evidence
    assert found.at_most == pytest.approx(1 / (1 - 0.2 / 0.3))
    dear = dataclasses.replace(item, layers=layers(*short, node(0.1, "Softmax"), plain_ms=0.15))
    assert advice(dear) == ()  # what was timed is mostly the profiler
    few = measurement(layers=layers(*short[:8], node(0.001, "Softmax")))
    assert advice(few) == ()


@pytest.mark.parametrize(
    ("op", "words"),
    [("DequantizeLinear", "Q/DQ"), ("Cast", "Cast nodes"), ("Transpose", "fused attention")],
)
def test_islands_that_only_convert(op: str, words: str) -> None:
    found = only(advice(measurement(layers=layers(SLOW, node(2.0, op)))))
    assert found.topic == "islands"
    assert words in found.what
    assert f"a {op} (2 ms)" in found.evidence
    assert found.at_most == pytest.approx(1.25)
    assert advice(measurement(layers=layers(SLOW, node(0.5, op)))) == ()


def test_times_of_a_gpu_s_nodes_in_onnx_runtime_say_nothing() -> None:
    cuda = dataclasses.replace(
        load_device("rtx-a2000"),
        engine="onnxruntime-cuda",
        precisions=("fp32", "fp16"),
        tensorrt_major=None,
    )
    for busy in (COMPUTING, WAITING, node(8.0, "Cast")):
        assert advice(measurement(layers=layers(busy, REST)), device=cuda) == ()


def test_layers_above_their_roof_say_that_the_roof_was_disturbed() -> None:
    fast = node(8.0, flops=2e9, moved=1e6)  # 250 of 100 GFLOP/s
    found = only(advice(measurement(layers=layers(fast, WAITING, REST))))
    assert found.topic == "measure again"
    assert "2.5 times as fast as the peak" in found.evidence
    barely = node(8.0, flops=0.84e9, moved=1e6)
    assert only(advice(measurement(layers=layers(barely, REST)))).topic == "precision"


def test_what_comes_from_a_cache_does_not_wait_for_memory() -> None:
    cached = node(8.0, flops=64e6, moved=800e6)  # 100 GB/s
    assert advice(measurement(layers=layers(cached, REST))) == ()
