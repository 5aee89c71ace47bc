"""Measurements made by hand, for the rules of advice."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeclip.profiles.layers.advice import Advice, advise
from edgeclip.profiles.layers.roofline import distances
from edgeclip.profiles.record.conditions import CpuTime, Interference
from edgeclip.profiles.record.measurement import (
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
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision
from tests.profiles.measure.run_cases import MACHINE, SHAPE, identity, run_of

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
    precision = item.identity.precision if item.identity else None
    layers = item.layers
    found = distances(layers, ROOFLINE, precision or "fp32") if layers else ()
    return advise(
        item,
        ROOFLINE,
        found,
        device,
        MACHINE,
        run or run_of(item, *others),
    )


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
