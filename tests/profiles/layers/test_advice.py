import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.layers.advice import MOST, Advice, advise, amdahl
from edgeclip.profiles.record.conditions import CpuTime, Interference
from edgeclip.profiles.record.measurement import (
    ColdStart,
    Latency,
    LayerProfile,
    LayerTime,
    Measurement,
    MeasurementRun,
    Roofline,
    StageName,
    StageTime,
    SweepPoint,
    WarmUp,
)
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.run_cases import SHAPE, identity, run_of

CPU = dataclasses.replace(load_device("x86-avx512-vnni"), threads=2, latency_budget_ms=None)
ROOFLINE = Roofline(
    threads=2,
    peak_gflops=(("fp32", Interval(100, 98, 102)), ("int8", Interval(300, 290, 310))),
    bandwidth_gb_s=Interval(20, 19, 21),
    method="by hand",
)


def near(value: float, by: float = 0.02) -> Interval:
    return Interval(value, value * (1 - by), value * (1 + by))


def latency(ms: float, by: float = 0.02) -> Latency:
    same = near(ms, by)
    return Latency(runs=100, p50_ms=same, p90_ms=same, p95_ms=same, p99_ms=None, p99_9_ms=None)


def cpu_time(process_s: float = 0.2, waiting: float | None = 0.0) -> CpuTime:
    return CpuTime(
        wall_s=0.1, thread_s=0.1, process_s=process_s, waiting_share=waiting, steal_share=None
    )


def measurement(**changes: Any) -> Measurement:
    """Quiet and unremarkable: 10 ms in fp32 with two threads."""
    fields: dict[str, Any] = {
        "name": "fp32",
        "part": "image",
        "input_shape": SHAPE,
        "warm_up": WarmUp(runs=10, settled=True),
        "latency": latency(10.0),
        "ratio": None,
        "sweep": (),
        "cpu": cpu_time(),
        "contended": False,
        "identity": identity(),
    }
    return Measurement(**(fields | changes))


def advice(
    item: Measurement,
    *others: Measurement,
    device: DeviceProfile = CPU,
    run: MeasurementRun | None = None,
) -> tuple[Advice, ...]:
    run = run or run_of(item, *others)
    return advise(dataclasses.replace(run, device=device, roofline=ROOFLINE), item)


def only(found: Sequence[Advice]) -> Advice:
    assert len(found) == 1, found
    return found[0]


def interference(
    *reasons: str, disturbed: bool | None, throttled: bool | None = None
) -> Interference:
    return Interference(
        waiting_share=None,
        steal_share=None,
        others_share=None,
        throttled=throttled,
        disturbed=disturbed,
        reasons=reasons,
    )


def stages(**ms: float) -> tuple[StageTime, ...]:
    names: dict[str, StageName] = {"read": "read", "decode": "decode", "resize": "resize"}
    names |= {"run": "run", "post": "post"}
    return tuple(StageTime(name=names[name], ms=near(value)) for name, value in ms.items())


def point(batch: int, threads: int | None, ms: float, by: float = 0.02) -> SweepPoint:
    return SweepPoint(
        batch=batch, threads=threads, items_per_s=near(1e3 * batch / ms, by), p50_ms=near(ms, by)
    )


def rounds(ms: float, seed: int) -> tuple[tuple[float, ...], ...]:
    draw = np.random.default_rng(seed)
    return tuple(tuple(ms * draw.normal(1, 0.01, 40)) for _ in range(3))


def in_precision(precision: Precision, ms: float, **changes: Any) -> Measurement:
    return measurement(
        name=precision,
        identity=identity(precision=precision, **changes),
        latency=latency(ms),
        samples_ms=rounds(ms, seed=round(10 * ms)),
    )


def layers(*times: LayerTime, plain_ms: float | None = None) -> LayerProfile:
    total = sum(item.ms for item in times)
    shared = tuple(dataclasses.replace(item, share=item.ms / total) for item in times)
    return LayerProfile(
        source="by hand", runs=1, total_ms=total, plain_ms=plain_ms or total, layers=shared
    )


def node(
    ms: float, op: str = "MatMul", flops: float | None = None, moved: float | None = None
) -> LayerTime:
    return LayerTime(
        name=f"a {op}",
        op=op,
        provider="CPUExecutionProvider",
        ms=ms,
        share=0.0,
        flops=flops,
        bytes=moved,
    )


COMPUTING = node(8.0, flops=0.72e9, moved=1e6)  # 90 of 100 GFLOP/s
WAITING = node(8.0, flops=64e6, moved=128e6)  # 16 of 20 GB/s
SLOW = node(8.0, flops=0.1e9, moved=1e6)  # far from any roof
REST = node(2.0, "Softmax")


def test_nothing_is_said_of_what_is_unremarkable() -> None:
    assert advice(measurement()) == ()


def test_a_roofline_is_not_needed_and_a_device_is() -> None:
    item = measurement(stages=stages(decode=9.0, run=1.0))
    assert advise(run_of(item), item) == ()
    assert only(advise(run_of(item, device=CPU), item)).topic == "pictures"


# --- Can the figures be believed?


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contended": True, "cpu": cpu_time(waiting=0.3)}, "30% waiting"),
        ({"warm_up": WarmUp(runs=7, settled=False)}, "still moved after 7 runs"),
    ],
)
def test_a_disturbed_measurement_is_made_again(changes: dict[str, Any], words: str) -> None:
    found = only(advice(measurement(**changes)))
    assert found.topic == "measure again"
    assert words in found.evidence
    assert found.at_most is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (interference("others used 40%", disturbed=True), "others used 40%"),
        (interference(disturbed=None, throttled=True), "slowed for its heat"),
        (interference(disturbed=True), "other work"),
    ],
)
def test_a_disturbed_run_is_made_again_before_all_else(found: Interference, words: str) -> None:
    item = measurement(stages=stages(decode=90.0, run=10.0))
    first, second = advice(item, run=run_of(item, interference=found))
    assert (first.topic, second.topic) == ("measure again", "pictures")
    assert words in first.evidence


def test_peaks_of_a_disturbed_machine_are_measured_again() -> None:
    item = measurement()
    for found, topics in (
        (interference("others used 40%", disturbed=True), ["measure again"]),
        (interference(disturbed=False), []),
        (interference(disturbed=None), []),
    ):
        roof = dataclasses.replace(ROOFLINE, interference=found)
        told = advise(run_of(item, device=CPU, roofline=roof), item)
        assert [each.topic for each in told] == topics
        assert all("others used 40% while peaks were measured" in each.evidence for each in told)


def test_what_cannot_be_told_is_no_disturbance() -> None:
    item = measurement(contended=None, cpu=cpu_time(waiting=None))
    unknown = interference(disturbed=None)
    assert advice(item, run=run_of(item, interference=unknown)) == ()
    assert advice(item, run=run_of(item, interference=interference(disturbed=False))) == ()


# --- Pictures, start


def test_decoding_that_dominates_asks_for_smaller_pictures() -> None:
    item = measurement(stages=stages(read=1.0, decode=5.0, resize=2.0, run=2.0))
    found = only(advice(item))
    assert found.topic == "pictures"
    assert found.at_most == pytest.approx(10 / 2)
    assert "80% of 10 ms" in found.evidence
    assert "encode_pixels" in found.what


@pytest.mark.parametrize(
    "ms",
    [
        {"decode": 4.0, "resize": 1.0, "run": 5.5},  # less than half
        {"decode": 5.05, "run": 4.95},  # more, but the intervals meet
        {"decode": 9.0, "post": 1.0},  # the tower did not run
        {"run": 9.0},
    ],
)
def test_decoding_that_does_not_dominate_is_left_alone(ms: dict[str, float]) -> None:
    assert advice(measurement(stages=stages(**ms))) == ()


def cold_start(load_ms: float, import_ms: float = 300.0) -> ColdStart:
    return ColdStart(
        processes=3,
        import_ms=import_ms,
        load_ms=load_ms,
        first_run_ms=100.0,
        peak_memory_mb=None,
        file_bytes=1,
    )


OPENVINO = dataclasses.replace(CPU, engine="onnxruntime-openvino")


def test_a_slow_load_asks_for_what_was_built_before() -> None:
    found = only(advice(measurement(cold_start=cold_start(3600.0)), device=OPENVINO))
    assert found.topic == found.gains == "start"
    assert f"`edgeclip build BUNDLE --device {CPU.name} --out FOLDER` writes EP" in found.what
    assert found.at_most == pytest.approx(10)


def test_a_load_that_cannot_be_prepared_or_is_short_is_left_alone() -> None:
    assert advice(measurement(cold_start=cold_start(3600.0))) == ()  # the CPU's session
    assert advice(measurement(cold_start=cold_start(450.0, 50.0)), device=OPENVINO) == ()
    assert advice(measurement(cold_start=cold_start(600.0, 900.0)), device=OPENVINO) == ()


# --- All together


def test_at_most_three_and_the_largest_gain_first() -> None:
    sweep = (point(1, 2, 10.0), point(1, 4, 6.0), point(8, 2, 60.0))
    slow = dataclasses.replace(
        in_precision("fp32", 10.0),
        sweep=sweep,
        stages=stages(decode=9.0, run=1.0),
        layers=layers(SLOW, node(2.0, "Cast")),
    )
    found = advice(slow, in_precision("int8", 5.0))
    assert [item.topic for item in found] == ["pictures", "precision", "threads"]
    assert len(found) == MOST
    assert [item.saves for item in found] == sorted((item.saves for item in found), reverse=True)
    disturbed = dataclasses.replace(slow, contended=True)
    topics = [item.topic for item in advice(disturbed, in_precision("int8", 5.0))]
    assert topics == ["measure again", "pictures", "precision"]


def test_a_topic_comes_once() -> None:
    """Faster int8 of this run says more than what the roofline would allow."""
    slow = dataclasses.replace(in_precision("fp32", 10.0), layers=layers(WAITING, REST))
    found = [item for item in advice(slow, in_precision("int8", 5.0)) if item.topic == "precision"]
    assert "in place of fp32" in only(found).what


@pytest.mark.parametrize(
    ("share", "times", "expected"), [(0.5, float("inf"), 2), (0.5, 2, 4 / 3), (0, 9, 1)]
)
def test_amdahl(share: float, times: float, expected: float) -> None:
    assert amdahl(share, times) == pytest.approx(expected)
    assert amdahl(1.0) == pytest.approx(1000)


# --- Threads, batches, precisions


def test_more_threads_that_are_faster() -> None:
    item = measurement(sweep=(point(1, 2, 10.0), point(1, 4, 6.0)))
    found = only(advice(item))
    assert (found.topic, found.gains) == ("threads", "latency")
    assert "`threads: 4`" in found.what
    assert found.at_most == pytest.approx(10 / 6)


def test_fewer_threads_that_are_faster_still() -> None:
    found = only(advice(measurement(sweep=(point(1, 1, 5.0), point(1, 2, 10.0)))))
    assert "`threads: 1`" in found.what
    assert found.gains == "latency"
    assert "with 1 thread," in found.evidence


def test_fewer_threads_that_are_as_fast() -> None:
    item = measurement(sweep=(point(1, 1, 10.1), point(1, 2, 10.0)))
    found = only(advice(item))
    assert (found.topic, found.gains) == ("threads", "processor time")
    assert found.at_most == 2


@pytest.mark.parametrize(
    "sweep",
    [
        (point(1, 1, 19.0), point(1, 2, 10.0)),
        (point(1, 1, 19.0), point(1, 2, 10.0), point(1, 4, 9.7)),  # less than 5%
        (point(1, 2, 10.0, by=0.3), point(1, 4, 8.0, by=0.3)),  # the intervals meet
        (point(1, 1, 10.2, by=0.2), point(1, 2, 10.0)),  # as fast perhaps, not for certain
        (point(1, None, 10.0),),
        (point(1, 4, 5.0),),  # nothing to compare it with
    ],
)
def test_threads_that_do_not_differ_for_certain(sweep: tuple[SweepPoint, ...]) -> None:
    assert advice(measurement(sweep=sweep)) == ()


def test_threads_that_spin() -> None:
    """Two threads take 20 ms of processor time a run, for work that takes one thread 12."""
    sweep = (point(1, 1, 12.0), point(1, 2, 10.0))
    found = only(advice(measurement(sweep=sweep, cpu=cpu_time(process_s=2.0))))
    assert (found.topic, found.gains) == ("threads", "processor time")
    assert found.at_most == pytest.approx(20 / 12)
    assert "batch 1 takes 12" in found.evidence
    assert advice(measurement(sweep=sweep, cpu=cpu_time(process_s=1.4))) == ()
    assert advice(measurement(sweep=sweep[1:], cpu=cpu_time(process_s=2.0))) == ()


def test_batches_that_raise_throughput() -> None:
    item = measurement(
        sweep=(point(1, 2, 10.0), point(4, 2, 20.0), point(8, 2, 38.0), point(16, 2, 80.0))
    )
    found = only(advice(item))
    assert (found.topic, found.gains) == ("batch", "throughput")
    assert "`edgeclip serve --max-batch 4`" in found.what  # 95% of the best of all
    assert found.at_most == pytest.approx(2)


def test_a_batch_must_keep_the_latency_bound() -> None:
    sweep = (point(1, 2, 10.0), point(4, 2, 30.0), point(8, 2, 40.0))
    hurried = dataclasses.replace(CPU, latency_budget_ms=35.0)
    found = only(advice(measurement(sweep=sweep), device=hurried))
    assert "--batch-size 4" in found.what
    assert "35 ms" in found.what
    never = dataclasses.replace(CPU, latency_budget_ms=5.0)
    assert advice(measurement(sweep=sweep), device=never) == ()
    bounded = dataclasses.replace(load_workload("quick"), server_bound_ms=35.0)
    item = measurement(sweep=sweep)
    assert only(advice(item, run=run_of(item, workload=bounded))).what == found.what


def test_batches_that_lower_throughput() -> None:
    found = only(advice(measurement(sweep=(point(1, 2, 10.0), point(8, 2, 100.0)))))
    assert "--batch-size 1" in found.what
    assert found.at_most == pytest.approx(1.25)


@pytest.mark.parametrize("ms", [78.0, 80.0, 82.0])
def test_batches_that_change_nothing(ms: float) -> None:
    assert advice(measurement(sweep=(point(1, 2, 10.0), point(8, 2, ms)))) == ()


def test_a_sweep_over_batches_is_one_of_the_same_threads() -> None:
    assert advice(measurement(sweep=(point(1, 2, 10.0), point(8, 4, 20.0)))) == ()
    unknown = measurement(sweep=(point(1, None, 10.0), point(8, None, 20.0)))
    assert only(advice(unknown)).topic == "batch"


def test_a_faster_precision_of_the_same_run() -> None:
    slow, fast = in_precision("fp32", 10.0), in_precision("int8", 5.0)
    found = only(advice(slow, fast))
    assert found.topic == "precision"
    assert "`--precision int8`" in found.what
    assert found.at_most == pytest.approx(2, rel=0.05)
    assert advice(fast, slow) == ()


def test_int8_that_is_slower() -> None:
    found = only(advice(in_precision("int8", 12.0), in_precision("fp32", 10.0)))
    assert "Run fp32 in place of int8" in found.what


def test_precisions_without_common_rounds_in_several_processes_are_not_compared() -> None:
    slow, fast = in_precision("fp32", 10.0), in_precision("int8", 5.0)
    assert advice(dataclasses.replace(slow, samples_ms=()), fast) == ()
    alone = (dataclasses.replace(item, samples_ms=item.samples_ms[:1]) for item in (slow, fast))
    assert advice(*alone) == ()  # one process tells nothing of others


@pytest.mark.parametrize(
    "other",
    [
        in_precision("int8", 9.9),
        in_precision("int8", 5.0, sha256="b" * 64),
        in_precision("int8", 5.0, engine="onnxruntime-openvino"),
        in_precision("int8", 5.0, threads=4),
        dataclasses.replace(in_precision("int8", 5.0), part="text"),
        dataclasses.replace(in_precision("int8", 5.0), identity=None),
        dataclasses.replace(in_precision("int8", 5.0), identity=identity(precision=None)),
    ],
)
def test_what_is_not_comparable_is_not_compared(other: Measurement) -> None:
    assert advice(in_precision("fp32", 10.0), other) == ()


# --- Layers


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
def test_nodes_that_only_convert(op: str, words: str) -> None:
    found = only(advice(measurement(layers=layers(SLOW, node(2.0, op)))))
    assert found.topic == "conversions"
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
