import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.profiles.layers.roofline import TOO_SHORT_MS, distances, peak_of
from edgeclip.profiles.record.measurement import LayerProfile, LayerTime, Roofline
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def roofline(bandwidth: float = 20.0, **peaks: float) -> Roofline:
    return Roofline(
        threads=2,
        peak_gflops=tuple((name, exactly(peak)) for name, peak in peaks.items()),
        bandwidth_gb_s=exactly(bandwidth),
        method="by hand",
    )


def layer(
    ms: float,
    flops: float | None,
    moved: float | None,
    *,
    op: str = "MatMul",
    provider: str = "CPUExecutionProvider",
) -> LayerTime:
    return LayerTime(
        name=f"the {op}", op=op, provider=provider, ms=ms, share=0.5, flops=flops, bytes=moved
    )


def profile(*layers: LayerTime) -> LayerProfile:
    total = sum(item.ms for item in layers)
    return LayerProfile(source="by hand", runs=1, total_ms=total, plain_ms=total, layers=layers)


def test_a_large_product_is_held_by_computing() -> None:
    roof = roofline(fp32=100.0)
    (found,) = distances(profile(layer(25.0, 2e9, 12e6)), roof, "fp32")
    assert found.intensity == pytest.approx(2e9 / 12e6)
    assert found.attainable_gflops == 100
    assert found.achieved_gflops == pytest.approx(80)
    assert found.achieved_gb_s == pytest.approx(0.48)
    assert found.least_ms == pytest.approx(20)
    assert found.share == pytest.approx(0.8)
    assert found.limit == "compute"
    assert (found.name, found.op, found.share_of_time) == ("the MatMul", "MatMul", 0.5)


def test_a_product_with_one_row_is_held_by_memory() -> None:
    """1 x 1024 by 1024 x 1024: every weight is read for one multiply-add."""
    flops, moved = 2.0 * 1024**2, 4.0 * 1024**2
    (found,) = distances(profile(layer(1.0, flops, moved)), roofline(fp32=100.0), "fp32")
    assert found.attainable_gflops == pytest.approx(0.5 * 20)
    assert found.least_ms == pytest.approx(moved / 20e6)
    assert found.share == pytest.approx(moved / 20e6)
    assert found.limit == "memory"


def test_what_moves_data_is_held_against_the_bandwidth() -> None:
    for flops in (None, 0.0):
        (found,) = distances(
            profile(layer(1.0, flops, 10e6, op="Transpose")), roofline(fp32=100.0), "fp32"
        )
        assert found.achieved_gflops is None
        assert found.attainable_gflops is None
        assert found.intensity is None
        assert found.achieved_gb_s == pytest.approx(10)
        assert found.share == pytest.approx(0.5)
        assert found.limit == "memory"


def test_what_shapes_do_not_tell_stays_unknown() -> None:
    nothing, no_bytes = distances(
        profile(layer(1.0, None, None), layer(1.0, 50e6, None)), roofline(fp32=100.0), "fp32"
    )
    assert (nothing.share, nothing.limit, nothing.least_ms) == (None, None, None)
    assert no_bytes.attainable_gflops == 100
    assert no_bytes.share == pytest.approx(0.5)
    assert no_bytes.limit is None  # memory may be the side that holds it


def test_a_short_layer_tells_nothing_but_overhead() -> None:
    (found,) = distances(profile(layer(TOO_SHORT_MS / 2, 1e3, 1e3)), roofline(fp32=100.0), "fp32")
    assert found.limit == "overhead"


def test_a_layer_that_took_no_time_has_no_rate() -> None:
    (found,) = distances(profile(layer(0.0, 1e3, 1e3)), roofline(fp32=100.0), "fp32")
    assert (found.achieved_gflops, found.share, found.limit) == (None, None, "overhead")


@pytest.mark.parametrize(
    ("op", "precision", "attainable"),
    [
        ("QLinearMatMul", "int8", 400),
        ("MatMulIntegerToFloat", "int8", 400),
        ("DynamicQuantizeMatMul", "int8", 400),
        ("QGemm", "int8", 400),
        ("MatMul", "fp32", 100),  # attention's own products stay in float
        ("Softmax", "fp32", 100),
    ],
)
def test_layers_of_an_int8_graph_have_the_roof_of_what_they_compute_in(
    op: str, precision: Precision, attainable: float
) -> None:
    roof = roofline(fp32=100.0, int8=400.0)
    (found,) = distances(profile(layer(1.0, 1e9, 1e3, op=op)), roof, "int8")
    assert (found.precision, found.attainable_gflops) == (precision, attainable)


def test_another_engine_names_its_layers_otherwise() -> None:
    roof = roofline(fp32=100.0, int8=400.0)
    tensorrt = layer(1.0, 1e9, 1e3, op="gemm", provider="TensorRT")
    (found,) = distances(profile(tensorrt), roof, "int8")
    assert (found.precision, found.attainable_gflops) == ("int8", 400)


def test_fp16_without_a_peak_is_computed_in_fp32_and_int8_is_not() -> None:
    roof = roofline(fp32=100.0)
    assert peak_of(roof, "fp16") == 100
    assert peak_of(roofline(fp32=100.0, fp16=150.0), "fp16") == 150
    assert peak_of(roof, "int8") is None
    (found,) = distances(profile(layer(1.0, 1e9, 1e3, op="QLinearMatMul")), roof, "int8")
    assert (found.attainable_gflops, found.share, found.limit) == (None, None, None)
    assert found.achieved_gflops == pytest.approx(1000)


positive = st.floats(1e-6, 1e12, allow_nan=False)
maybe = st.none() | st.just(0.0) | positive


@given(
    ms=st.floats(0, 1e6),
    flops=maybe,
    moved=maybe,
    peak=st.floats(1e-3, 1e6),
    bandwidth=st.floats(1e-3, 1e5),
)
def test_no_roof_is_above_the_peak_and_all_agree(
    ms: float, flops: float | None, moved: float | None, peak: float, bandwidth: float
) -> None:
    (found,) = distances(profile(layer(ms, flops, moved)), roofline(bandwidth, fp32=peak), "fp32")
    if found.attainable_gflops is not None:
        assert 0 < found.attainable_gflops <= peak
        if found.intensity is not None:
            assert found.attainable_gflops <= found.intensity * bandwidth * (1 + 1e-12)
        if found.achieved_gflops is not None and found.share is not None:
            ratio = found.achieved_gflops / found.attainable_gflops
            assert math.isclose(ratio, found.share, rel_tol=1e-9)
    assert found.limit != "compute" or found.attainable_gflops == peak
    assert (found.share is None) == (found.least_ms is None or ms == 0)
