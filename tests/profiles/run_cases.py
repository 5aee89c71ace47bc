"""Runs of `edgeclip profile` made by hand, with samples that follow a known law."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeclip.profiles.compare.compare_runs import Comparison, compare_runs
from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import (
    Identity,
    Measurement,
    MeasurementRun,
    WarmUp,
    Yardstick,
)
from edgeclip.profiles.record.timing_statistics import Runs, latency_of
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.device.machine import Machine

MACHINE = Machine(
    cpu="test", cores=2, flags=("avx2",), memory_mb=8000, os="Linux", python="3", packages=()
)
SHAPE = (1, 64, 64, 3)
ROUNDS = 20


def processes(
    rng: np.random.Generator, ms: float, *, count: int = 5, spread: float = 0.01
) -> list[Runs]:
    """Processes whose medians differ by `spread`, and whose runs hardly do."""
    effects = rng.normal(0, spread, count)
    return [ms * np.exp(effect + rng.normal(0, 0.002, ROUNDS)) for effect in effects]


def measurement(name: str, samples: Sequence[Runs], **changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "name": name,
        "part": "image",
        "input_shape": SHAPE,
        "warm_up": WarmUp(runs=10, settled=True),
        "latency": latency_of(samples),
        "ratio": None,
        "sweep": (),
        "cpu": CpuTime(wall_s=1, thread_s=1, process_s=1, waiting_share=0, steal_share=0),
        "contended": False,
        "samples_ms": tuple(tuple(map(float, runs)) for runs in samples),
        "identity": identity(),
    }
    return Measurement(**(fields | changes))


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "bundle": "b",
        "sha256": "a" * 64,
        "precision": "fp32",
        "engine": "onnxruntime-cpu",
        "provider": "CPUExecutionProvider",
        "threads": 2,
        "bytes_on_disk": 1000,
        "input_shape": SHAPE,
    }
    return Identity(**(fields | changes))


def run_of(*measurements: Measurement, **changes: Any) -> MeasurementRun:
    fields: dict[str, Any] = {
        "created": "2026-11-21T00:00:00+00:00",
        "command": "edgeclip profile bundle",
        "workload": load_workload("quick"),
        "machine": MACHINE,
        "measurements": measurements,
    }
    return MeasurementRun(**(fields | changes))


def run_with(samples: Mapping[str, Sequence[Runs]], **changes: Any) -> MeasurementRun:
    return run_of(*(measurement(name, runs) for name, runs in samples.items()), **changes)


def yardstick(samples: Sequence[Runs], name: str = "stick") -> Yardstick:
    return Yardstick(name=name, samples_ms=tuple(tuple(map(float, runs)) for runs in samples))


def compared(
    rng: np.random.Generator, ratio: float, *, count: int = 5, spread: float = 0.01
) -> Comparison:
    """One subject, `ratio` times slower now, in a run of its own."""
    now, baseline = (
        run_with({"fp32": processes(rng, ms, count=count, spread=spread)}) for ms in (ratio, 1.0)
    )
    return compare_runs(now, baseline)[0]
