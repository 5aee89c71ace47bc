"""MeasurementRun: what was measured, on which machine, by which command, as JSON."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

from edgeclip.profiles.record.conditions import Conditions, CpuTime, Interference
from edgeclip.profiles.workload import Scenario, Workload
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.device.schema import Range, check_ranges
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """One node of the graph that the engine really ran (after its own fusions).

    Attributes:
        name: as the engine calls it.
        op: operator, such as "MatMul".
        provider: that ran it.
        ms: median over runs.
        share: of the sum of all layers.
        flops: floating-point (or integer) operations of one run, 2 for a multiply-add; None
            where they cannot be told from shapes.
        bytes: read and written at least once: inputs, weights and outputs; None likewise.
    """

    name: str
    op: str
    provider: str
    ms: float
    share: float
    flops: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """All layers of one tower at batch 1.

    Attributes:
        source: what told the times, such as "ONNX Runtime profiling".
        runs: how many were profiled.
        total_ms: median of the sums.
        plain_ms: median without profiling, to see what profiling itself costs.
        layers: the slowest first.
    """

    source: str
    runs: int
    total_ms: float
    plain_ms: float
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is known of a layer before it is timed; see `LayerTime`."""

    name: str
    op: str
    provider: str
    flops: float | None
    bytes: float | None


def layer_profile(
    source: str,
    layers: Mapping[Key, Layer],
    runs: Sequence[Mapping[Key, float]],
    plain_ms: Sequence[float],
) -> LayerProfile:
    """Medians over runs, the slowest layer first.

    Args:
        source: see `LayerProfile`.
        layers: every layer that ran, by whatever tells it from the others.
        runs: milliseconds of each layer, one mapping a run; a layer that a run lacks took none.
        plain_ms: whole runs without profiling.
    """
    medians = {key: statistics.median(run.get(key, 0.0) for run in runs) for key in layers}
    total = sum(medians.values())
    times = (
        LayerTime(
            name=layer.name,
            op=layer.op,
            provider=layer.provider,
            ms=medians[key],
            share=medians[key] / total if total else 0.0,
            flops=layer.flops,
            bytes=layer.bytes,
        )
        for key, layer in layers.items()
    )
    return LayerProfile(
        source=source,
        runs=len(runs),
        total_ms=statistics.median(sum(run.values()) for run in runs),
        plain_ms=statistics.median(plain_ms),
        layers=tuple(sorted(times, key=lambda layer: -layer.ms)),
    )


def run_in_turns(
    plain: Callable[[], object], profiled: Callable[[], object], *, runs: int, warm_up: int
) -> tuple[float, ...]:
    """Run both `warm_up` times and then `runs` times, in turns; milliseconds of the plain runs.

    Raises:
        InputError: fewer than one run, or less than no warm-up.
    """
    if runs < 1 or warm_up < 0:
        raise InputError(f"profile at least 1 run after 0 or more, not {runs} after {warm_up}")
    times = []
    for number in range(warm_up + runs):
        if number % 2:
            profiled()
        start = time.perf_counter()
        plain()
        times.append(1e3 * (time.perf_counter() - start))
        if not number % 2:
            profiled()
    return tuple(times[warm_up:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Measured peaks of this machine with the threads of the device profile.

    Attributes:
        threads: that were used.
        peak_gflops: 10^9 operations a second of a large product, by precision ("fp32", "int8").
        bandwidth_gb_s: 10^9 bytes a second, reading and writing memory far larger than caches.
        method: how they were measured, for a person.
        interference: what else the machine did meanwhile; where it was disturbed, even the fastest
            runs may be far below the peak. None where nobody watched.
    """

    threads: int
    peak_gflops: tuple[tuple[str, Interval], ...]
    bandwidth_gb_s: Interval
    method: str
    interference: Interference | None = None


# "file" is the whole way from an image file to its embedding, "split" the same with a server.
Part = Literal["image", "text", "file", "split"]
StageName = Literal["read", "decode", "resize", "tokenize", "copy", "run", "post", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Runs before the timed ones. `settled` is False if the median was still moving."""

    runs: int
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Wall time of `runs` timed runs or queries in milliseconds, with 95% intervals.

    With several processes a value is the geometric mean of the processes' own percentiles. One is
    None where too few runs lie beyond it to know it: the 99th needs 100 runs in each process, the
    99.9th 1,000.
    """

    runs: Annotated[int, Range(at_least=1)]
    p50_ms: Interval
    p90_ms: Interval
    p95_ms: Interval
    p99_ms: Interval | None
    p99_9_ms: Interval | None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRatio:
    """Median over rounds of this subject's time divided by the reference's."""

    reference: str
    ratio: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """Images or texts per second in batches of `batch`, and how long one batch takes.

    `threads` are the engine's; None where they are not known.
    """

    batch: int
    threads: int | None
    items_per_s: Interval
    p50_ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """What MLPerf LoadGen found in one scenario.

    Attributes:
        scenario: which.
        queries: how many were answered.
        samples_per_query: images or texts in each.
        seconds: how long it took.
        latency: of a query from its scheduled time (Server), else from its issue; None for
            Offline, which is one query.
        samples_per_s: images or texts a second.
        target_qps: queries a second that were asked for; Server only.
        bound_ms: the latency that `bound_percentile` of the queries must keep; Server only.
        bound_percentile: in percent; Server only.
        valid: LoadGen's own verdict.
        loadgen_p50_ms: the median in LoadGen's own log, to compare ours with.
        reasons: why it is not valid, in LoadGen's words.
        settings: those of LoadGen that differ from its defaults; for Offline also our batch.
    """

    scenario: Scenario
    queries: int
    samples_per_query: int
    seconds: float
    latency: Latency | None
    samples_per_s: Interval
    target_qps: float | None
    bound_ms: float | None
    bound_percentile: float | None
    valid: bool
    loadgen_p50_ms: float | None
    reasons: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartIntervals:
    """The steps of a cold start in milliseconds, with 95% intervals over processes; see `Latency`.

    `total_ms` is of whole starts.
    """

    import_ms: Interval
    load_ms: Interval
    first_run_ms: Interval
    total_ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A fresh process that loads one model and runs it once.

    Times are in milliseconds, geometric means over `processes`. `peak_memory_mb` (MB of 10^6
    bytes, the whole process, median) is None where the platform does not report it, `intervals`
    of a single process, which tells of no other.
    """

    processes: int
    import_ms: float
    load_ms: float
    first_run_ms: float
    peak_memory_mb: float | None
    file_bytes: int
    intervals: StartIntervals | None = None

    @property
    def total_ms(self) -> float:
        """All three steps: the mean of whole starts, which is not quite the sum of the means."""
        if self.intervals is not None:
            return self.intervals.total_ms.value
        return self.import_ms + self.load_ms + self.first_run_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy of one image or text while it runs again and again at batch 1.

    Attributes:
        sensor: what measured it.
        covers: what the sensor counts, such as "processor package".
        joules: for each item, idle power included.
        idle_watts: of the same sensor, before; None where that was not measured.
    """

    sensor: str
    covers: str
    joules: Interval
    idle_watts: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One step of an answer, at batch 1, in milliseconds."""

    name: StageName
    ms: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a measurement is of, so that it can be found again.

    Attributes:
        bundle: name of the bundle, or of a peer's file.
        sha256: of the bundle's manifest, or of a peer's file: 64 hexadecimal digits.
        precision: that ran; None for a peer.
        engine: as a `DeviceProfile` calls it.
        provider: that computed, as the session itself says, such as "CPUExecutionProvider"; where
            the device allows a fallback all that may, the preferred one first.
        threads: of the engine.
        bytes_on_disk: what must be stored for it: graph and weights.
        input_shape: of one item at batch 1; a text tower's time depends on its length.
    """

    bundle: str
    sha256: str
    precision: Precision | None
    engine: str
    provider: str
    threads: int
    bytes_on_disk: int
    input_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One subject (a part of a bundle in some precision on some engine) under one workload.

    Attributes:
        name: unique in its run and part.
        part: what is run.
        input_shape: at batch 1.
        warm_up: before the timed runs.
        latency: one run after the other at batch 1, all subjects taking turns.
        ratio: to the reference of the run.
        sweep: batches and threads.
        cpu, contended: see `CpuTime`.
        samples_ms: wall time of each run behind `latency`, one tuple a process, in order; round
            i of a process is round i of every subject in it.
        identity: None for what is not of a bundle.
        cold_start, scenarios, energy, stages, layers: where they were asked for.
        peak_memory_mb: of the process that ran this subject alone, MB of 10^6 bytes.
        missing: what could not be measured, and why, such as ("energy", "no sensor").
    """

    name: str
    part: Part
    input_shape: tuple[int, ...]
    warm_up: WarmUp
    latency: Latency
    ratio: PairedRatio | None
    sweep: tuple[SweepPoint, ...]
    cpu: CpuTime
    contended: bool | None
    samples_ms: tuple[tuple[float, ...], ...] = ()
    identity: Identity | None = None
    cold_start: ColdStart | None = None
    scenarios: tuple[ScenarioResult, ...] = ()
    energy: Energy | None = None
    stages: tuple[StageTime, ...] = ()
    layers: LayerProfile | None = None
    peak_memory_mb: float | None = None
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """A small fixed graph that takes turns with the subjects: what the machine was worth.

    Times of two runs of `edgeclip profile` differ where the machine was faster or slower; times
    divided by the yardstick's differ less.

    Attributes:
        name: of the graph; another name is another yardstick.
        samples_ms: as in `Measurement`.
    """

    name: str
    samples_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRun(JsonRecord):
    """Everything needed to believe, and to repeat, some measurements.

    Attributes:
        created: ISO 8601 in UTC.
        command: what was typed.
        workload: how much was measured.
        machine: where; versions of packages are part of it.
        measurements: of the subjects.
        device: the profile that chose the engine; None where each subject had its own.
        before, after: clocks and temperatures around the timed runs.
        interference: what else the machine did meanwhile.
        yardstick: None where none took part.
        roofline: what this machine can do at most; None where it was not measured.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "measurements"
    MEND: ClassVar[str] = "measure again with `edgeclip profile`"

    created: str
    command: str
    workload: Workload
    machine: Machine
    measurements: tuple[Measurement, ...]
    device: DeviceProfile | None = None
    before: Conditions | None = None
    after: Conditions | None = None
    interference: Interference | None = None
    yardstick: Yardstick | None = None
    roofline: Roofline | None = None
