"""Measurement runs as a real profile gives them, made of drawn numbers: for tests and for looking.

`quiet_run` is a server with every sensor; `disturbed_run` a laptop that throttled, has no
energy counter, and whose times have two humps.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from edgeclip.profiles.record.conditions import CpuTime, Interference, MachineConditions
from edgeclip.profiles.record.measurement import (
    Identity,
    Latency,
    Measurement,
    MeasurementRun,
    PairedRatio,
    Part,
    SweepPoint,
    WarmUp,
    Yardstick,
)
from edgeclip.profiles.report.profile_data import NamedRun, SubjectQuality
from edgeclip.profiles.report.sections import AdviceNote
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.report.profile_factory_parts import (
    around,
    cold_start_of,
    energy_of,
    layers_of,
    roofline,
    scenarios_of,
    stages_of,
)

PROCESSES, RUNS = 5, 220
BUNDLES = {"student": "5a" * 32, "teacher": "7e" * 32}
# bundle, precision, median ms of the image tower, bytes on disk
SUBJECTS: tuple[tuple[str, Precision, float, int], ...] = (
    ("student", "fp32", 1.21, 7_420_000),
    ("student", "fp16", 1.27, 3_730_000),
    ("student", "int8", 0.684, 1_980_000),
    ("teacher", "fp32", 6.79, 28_500_000),
    ("teacher", "fp16", 6.95, 14_300_000),
    ("teacher", "int8", 3.12, 7_400_000),
)
WORKLOAD = Workload(
    name="full",
    description="every figure, with narrow intervals",
    batch_sizes=(1, 4, 16, 64),
    min_warmup_runs=20,
    max_warmup_seconds=5.0,
    repeats=RUNS,
    seconds_per_batch=2.0,
    cold_starts=5,
    threads=(1, 2, 4),
    processes=PROCESSES,
    scenarios=("SingleStream", "MultiStream", "Server", "Offline"),
)


@functools.lru_cache
def quiet_run() -> MeasurementRun:
    """A server with every sensor, left alone."""
    return _run(1.0, disturbed=False)


@functools.lru_cache
def disturbed_run() -> MeasurementRun:
    """A laptop beside other work: half as fast, throttled, without an energy counter."""
    return _run(2.1, disturbed=True)


def two_runs() -> tuple[NamedRun, ...]:
    """Both, as they would stand side by side."""
    return (
        NamedRun(name="epyc", run=quiet_run()),
        NamedRun(name="laptop", run=disturbed_run()),
    )


def alone(run: MeasurementRun) -> tuple[NamedRun, ...]:
    """One run, called epyc."""
    return (NamedRun(name="epyc", run=run),)


def with_items(run: MeasurementRun, **changes: Any) -> MeasurementRun:
    """The run with the same fields of every measurement changed."""
    items = tuple(dataclasses.replace(item, **changes) for item in run.measurements)
    return dataclasses.replace(run, measurements=items)


def quality() -> tuple[SubjectQuality, ...]:
    """R@1 against fp32 and cosines of the student; R@1 of the teacher."""
    found = []
    for bundle, drop in (("student", 0.35), ("teacher", 0.12)):
        steps: tuple[tuple[Precision, float], ...] = (("fp32", 0.0), ("fp16", 0.05), ("int8", drop))
        for precision, loss in steps:
            wide = 0.0 if precision == "fp32" else 0.15
            found.append(
                SubjectQuality(
                    metric="R@1 against fp32",
                    value=Interval(-loss, -loss - wide, -loss + wide),
                    unit="points",
                    sha256=BUNDLES[bundle],
                    precision=precision,
                    part=None,
                )
            )
    for precision, cosine in (("fp32", 0.9999999), ("fp16", 0.99998), ("int8", 0.99712)):
        found.append(
            SubjectQuality(
                metric="mean cosine to torch",
                value=Interval(cosine, cosine - 2e-5, min(1.0, cosine + 2e-5)),
                unit="cosine",
                sha256=BUNDLES["student"],
                precision=precision,
                part="image",
            )
        )
    return tuple(found)


def advice() -> tuple[AdviceNote, ...]:
    """Two notes such as the analysis of a profile gives."""
    return (
        AdviceNote(
            subject="student int8 (image tower)",
            title="Fuse the normalisation into the first convolution",
            text="Sub, Div and Transpose run before the first convolution on every pixel.",
            evidence=("Sub 0.061 ms, 8.9%", "Div 0.052 ms, 7.6%"),
            gain="about 0.11 ms (16%)",
        ),
        AdviceNote(
            subject="from image file to embedding",
            title="Decode JPEG at a smaller scale",
            text="Decoding takes more than three times as long as the tower.",
            evidence=("decode 2.31 ms of 3.89 ms",),
        ),
    )


def _run(slow: float, *, disturbed: bool) -> MeasurementRun:
    measured = [
        *(_measurement(*entry, "image", slow, disturbed) for entry in SUBJECTS),
        *(
            _measurement(bundle, precision, ms / 5, size, "text", slow, disturbed)
            for bundle, precision, ms, size in SUBJECTS
            if bundle == "student"
        ),
        _measurement("student", "int8", 3.89, 1_980_000, "file", slow, disturbed),
        _measurement("student", "fp32", 4.44, 7_420_000, "file", slow, disturbed),
    ]
    return MeasurementRun(
        created="2026-11-20T09:12:00+00:00" if disturbed else "2026-11-21T18:40:00+00:00",
        command="edgeclip profile student teacher --workload full --out "
        + ("laptop.json" if disturbed else "epyc.json"),
        workload=WORKLOAD,
        machine=_machine(disturbed),
        measurements=tuple(measured),
        device=DeviceProfile(
            name="this-machine",
            description="detected",
            engine="onnxruntime-cpu",
            precisions=("fp32", "fp16", "int8"),
            threads=2,
            memory_mb=16000,
        ),
        before=_conditions("before", disturbed),
        after=_conditions("after", disturbed),
        interference=_interference(disturbed),
        yardstick=Yardstick(
            name="matmul-256 v1", samples_ms=_samples("yardstick", 0.52 * slow, disturbed)
        ),
        roofline=None if disturbed else roofline(),
    )


def _machine(disturbed: bool) -> Machine:
    versions = ("1.30.0", "2.4.1") if disturbed else ("1.31.1", "2.4.6")
    return Machine(
        cpu="Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz" if disturbed else "AMD EPYC 9B14",
        cores=4,
        flags=("avx2", "fma") if disturbed else ("avx2", "fma", "avx512f", "avx512_vnni"),
        memory_mb=7900 if disturbed else 25276,
        os="Linux 6.8.0" if disturbed else "Linux 6.18.44",
        python="CPython 3.11.7",
        packages=(("edgeclip", "0.2.0"), ("onnxruntime", versions[0]), ("numpy", versions[1])),
    )


def _conditions(when: str, disturbed: bool) -> MachineConditions:
    after = when == "after"
    if not disturbed:
        return MachineConditions(
            taken="2026-11-21T18:30:00+00:00",
            cpu_mhz=(3701.2, 3698.0, 3702.9, 3700.1),
            governor="performance",
            load_1m=2.11 if after else 0.04,
            temperatures_c=(("k10temp Tctl", 58.0 if after else 41.0),),
            throttle_counts=(("core_throttle_count", 0),),
            gpu=(),
        )
    return MachineConditions(
        taken="2026-11-20T09:00:00+00:00",
        cpu_mhz=(1600.0, 1587.0, 1612.0, 1599.0) if after else (3390.0, 3401.0, 3397.0, 3400.0),
        governor="powersave",
        load_1m=6.4 if after else 3.9,
        temperatures_c=(("x86_pkg_temp", 97.0 if after else 71.0),),
        throttle_counts=(("core_throttle_count", 1841 if after else 212),),
        gpu=(("clocks.sm", "1410 MHz"), ("temperature.gpu", "61" if after else "44")),
    )


def _interference(disturbed: bool) -> Interference:
    if not disturbed:
        return Interference(
            waiting_share=0.004,
            steal_share=0.0,
            others_share=0.011,
            throttled=False,
            disturbed=False,
            reasons=(),
        )
    return Interference(
        waiting_share=0.243,
        steal_share=None,
        others_share=0.31,
        throttled=True,
        disturbed=True,
        reasons=("24% of the CPU time was waited for", "other programs used 31% of the processors"),
    )


def _samples(seed: str, ms: float, disturbed: bool) -> tuple[tuple[float, ...], ...]:
    """Skewed times with rare slow runs; with a second hump where the machine was disturbed."""
    rng = np.random.default_rng(sum(map(ord, seed)))
    processes = []
    for _ in range(PROCESSES):
        times: Values = ms * rng.normal(1.0, 0.012) * np.exp(rng.gamma(2.0, 0.008, RUNS))
        times *= np.where(rng.random(RUNS) < 0.006, rng.uniform(1.5, 4, RUNS), 1.0)
        if disturbed:
            times *= np.where(rng.random(RUNS) < 0.35, 1.6, 1.0)
        processes.append(tuple(map(float, np.round(times, 5))))
    return tuple(processes)


def _latency(samples: tuple[tuple[float, ...], ...]) -> Latency:
    every = np.concatenate([np.array(runs) for runs in samples])

    def at(percent: float, share: float) -> Interval:
        return around(float(np.percentile(every, percent)), share)

    return Latency(
        runs=len(every),
        p50_ms=at(50, 0.012),
        p90_ms=at(90, 0.02),
        p95_ms=at(95, 0.03),
        p99_ms=at(99, 0.11),
        p99_9_ms=at(99.9, 0.2) if len(every) >= 1000 else None,
    )


def _measurement(
    bundle: str,
    precision: Precision,
    ms: float,
    size: int,
    part: Part,
    slow: float,
    disturbed: bool,
) -> Measurement:
    name = f"{bundle} {precision}"
    ms *= slow
    samples = _samples(f"{name}{part}", ms, disturbed)
    rich = name == "student int8" and part == "image"
    tower = part in ("image", "text")
    return Measurement(
        name=name,
        part=part,
        input_shape=(1, 77) if part == "text" else (1, 64, 64, 3),
        warm_up=WarmUp(runs=24, settled=not (disturbed and name == "teacher fp16")),
        latency=_latency(samples),
        ratio=None
        if name == "student fp32"
        else PairedRatio(reference="student fp32", ratio=around(_ratio(ms, slow, part), 0.015)),
        sweep=_sweep(ms) if tower else (),
        cpu=CpuTime(wall_s=ms, thread_s=ms, process_s=2 * ms, waiting_share=0.01, steal_share=None),
        contended=disturbed if tower else None,
        samples_ms=samples,
        identity=Identity(
            bundle=f"emoji-{bundle}",
            sha256=BUNDLES[bundle],
            precision=precision,
            engine="onnxruntime-cpu",
            provider="CPUExecutionProvider",
            threads=2,
            bytes_on_disk=size,
            input_shape=(1, 77) if part == "text" else (1, 64, 64, 3),
        ),
        cold_start=cold_start_of(ms, size) if tower and bundle == "student" else None,
        scenarios=scenarios_of(ms) if rich else (),
        energy=energy_of(ms) if tower and not disturbed else None,
        stages=stages_of(ms / 3.89) if part == "file" else (),
        layers=layers_of(ms) if rich else None,
        peak_memory_mb=70 + 2.3 * size / 1e6 if bundle == "student" else None,
        missing=_missing(disturbed, tower),
    )


def _ratio(ms: float, slow: float, part: Part) -> float:
    reference = {"image": 1.21, "text": 0.242, "file": 4.44, "split": 1.0}[part]
    return ms / slow / reference


def _missing(disturbed: bool, tower: bool) -> tuple[tuple[str, str], ...]:
    if disturbed and tower:
        return (
            ("energy", "no energy counter may be read: run as root, or see docs of powercap"),
            ("cache misses", "perf_event_paranoid is 4"),
        )
    return ()


def _sweep(ms: float) -> tuple[SweepPoint, ...]:
    points = []
    for threads, gain in ((1, 1.0), (2, 1.85), (4, 3.1)):
        for batch in WORKLOAD.batch_sizes:
            time = 1.85 * ms / gain * batch ** (0.93 + 0.005 * threads)
            points.append(
                SweepPoint(
                    batch=batch,
                    threads=threads,
                    items_per_s=around(1000 * batch / time, 0.02),
                    p50_ms=around(time, 0.02),
                )
            )
    return tuple(points)
