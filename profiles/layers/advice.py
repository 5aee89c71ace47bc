"""Advice: at most three things to try next, each supported by the measurements."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeclip.profiles.layers.node_costs import is_product
from edgeclip.profiles.layers.roofline import LayerDistance, Limit, peak_of
from edgeclip.profiles.record.measurement import Measurement, MeasurementRun, Roofline, SweepPoint
from edgeclip.profiles.record.timing_statistics import Runs, paired_ratio_of
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.engines.providers import PROVIDERS
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision

Gains = Literal["certainty", "latency", "throughput", "processor time", "start"]
NOISE = 1.1  # of a roof; what is above that is not held by it
_NEARLY_ALL = 0.999  # a share of 1 would promise an endless gain
_FEW = 0.05  # of the time of all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing to try next.

    Attributes:
        topic: of the rule, such as "threads".
        what: to do, one sentence with the command or setting that does it.
        evidence: the figures that say so.
        gains: what becomes better.
        at_most: how many times better, a bound and no promise; None where there is none.
    """

    topic: str
    what: str
    evidence: str
    gains: Gains
    at_most: float | None

    @property
    def saves(self) -> float:
        """The largest share of what there is now that can be saved, 0 to 1."""
        return 0.0 if self.at_most is None else max(0.0, 1 - 1 / self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A measurement with what is known around it; see `advise`."""

    measurement: Measurement
    roofline: Roofline | None
    distances: tuple[LayerDistance, ...]
    device: DeviceProfile
    machine: Machine
    run: MeasurementRun

    @property
    def precision(self) -> Precision | None:
        """What ran; None for a file of someone else's."""
        identity = self.measurement.identity
        return None if identity is None else identity.precision

    @property
    def threads(self) -> int:
        """Of the engine."""
        identity = self.measurement.identity
        return self.device.threads if identity is None else identity.threads

    def alone(self) -> SweepPoint | None:
        """Batch 1 with the threads of the measurement."""
        return next((item for item in self.by_batch() if item.batch == 1), None)

    def by_batch(self) -> list[SweepPoint]:
        """The sweep with the threads of the measurement."""
        sweep = self.measurement.sweep
        same = [item for item in sweep if item.threads == self.threads]
        return same or [item for item in sweep if item.threads is None]

    def by_threads(self) -> list[SweepPoint]:
        """The sweep at batch 1, where its threads are known."""
        return [item for item in self.measurement.sweep if item.batch == 1 and item.threads]

    def siblings(self) -> list[Measurement]:
        """The same part of the same bundle on the same engine in other precisions."""
        own = self.measurement.identity
        if own is None or own.precision is None:
            return []
        return [
            item
            for item in self.run.measurements
            if item.part == self.measurement.part
            and (found := item.identity) is not None
            and found.precision not in (None, own.precision)
            and (found.sha256, found.engine, found.threads) == (own.sha256, own.engine, own.threads)
            and (item.part != "text" or item.input_shape == self.measurement.input_shape)
        ]

    def measured_precisions(self) -> set[Precision | None]:
        """Of the siblings."""
        return {item.identity.precision for item in self.siblings() if item.identity}

    def above_the_roof(self) -> float | None:
        """How much faster than the peak layers computed, as a factor; None if they did not.

        Nothing computes faster than the peak, so it was measured while something disturbed it.
        """
        above = [
            item for item in self.distances if item.limit == "compute" and (item.share or 0) > NOISE
        ]
        if share_of_time(above) < _FEW:
            return None
        return max(item.share or 0 for item in above)


def amdahl(share: float, times: float = float("inf")) -> float:
    """How many times faster all becomes when `share` of it becomes `times` as fast.

    Source: Amdahl, "Validity of the single processor approach to achieving large scale
    computing capabilities", AFIPS 1967.
    """
    share = min(share, _NEARLY_ALL)
    return 1 / (1 - share + share / times)


def share_of_time(layers: Iterable[LayerDistance]) -> float:
    """Of the whole tower."""
    return sum(layer.share_of_time for layer in layers)


def percent(share: float) -> str:
    """0.413 is "41%"."""
    return f"{100 * share:.0f}%"


def span(value: Interval, unit: str = "") -> str:
    """ "1.43 [1.40, 1.47] ms"."""
    return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]{unit and ' ' + unit}"


MEASURE_AGAIN = "measure again"


def measure_again(case: Case) -> Advice | None:
    """The run, this measurement or the roofline was made on a machine that was not at rest.

    That is: the run or its roofline was disturbed or throttled; the measurement contended or never
    warm; layers computed faster than the peak. What cannot be told (None) is no reason.
    """
    reasons = [*_of_the_run(case), *_of_the_measurement(case), *_of_the_roofline(case)]
    if not reasons:
        return None
    return Advice(
        topic=MEASURE_AGAIN,
        what="Measure again before you believe anything: close what else runs, let the machine "
        "cool, and repeat the command of this run",
        evidence="; ".join(dict.fromkeys(reasons)),
        gains="certainty",
        at_most=None,
    )


def _of_the_run(case: Case) -> list[str]:
    found = case.run.interference
    if found is None:
        return []
    reasons = list(found.reasons) if found.disturbed or found.throttled else []
    if found.throttled and not reasons:
        reasons.append("a processor was slowed for its heat or supply")
    return reasons or (["other work disturbed the run"] if found.disturbed else [])


def _of_the_measurement(case: Case) -> list[str]:
    item, reasons = case.measurement, []
    if item.contended:
        shares = {"waiting": item.cpu.waiting_share, "stolen": item.cpu.steal_share}
        known = [f"{percent(share)} {name}" for name, share in shares.items() if share is not None]
        told = f": {', '.join(known)}" if known else ""
        reasons.append(f"processor time was denied to {item.name}{told}")
    if not item.warm_up.settled:
        reasons.append(
            f"the median still moved after {item.warm_up.runs} runs: raise max_warmup_seconds "
            "in the workload"
        )
    return reasons


def _of_the_roofline(case: Case) -> list[str]:
    roof, above = case.roofline, case.above_the_roof()
    found = None if roof is None else roof.interference
    reasons = [] if found is None else [f"{why} while peaks were measured" for why in found.reasons]
    if above is not None:
        reasons.append(f"layers computed {above:.1f} times as fast as the peak that was measured")
    return reasons


_MOST = 0.5  # of the whole
_SLOW_START_MS = 500


def smaller_pictures(case: Case) -> Advice | None:
    """Reading, decoding and resizing take more than half of an answer, and more than running."""
    stages = {item.name: item.ms for item in case.measurement.stages}
    before = {name: stages[name] for name in ("read", "decode", "resize") if name in stages}
    total = sum(ms.value for ms in stages.values())
    if not before or "run" not in stages or total <= 0:
        return None
    share = sum(ms.value for ms in before.values()) / total
    if share <= _MOST or sum(ms.low for ms in before.values()) <= stages["run"].high:
        return None
    parts = ", ".join(f"{name} {ms.value:.3g} ms" for name, ms in before.items())
    return Advice(
        topic="pictures",
        what="Give smaller files, JPEG above all, which is reduced while it is decoded, or camera "
        "frames that have the tower's size already (`Encoder.encode_pixels`)",
        evidence=f"{percent(share)} of {total:.3g} ms go by before the tower runs: {parts}; run "
        f"{stages['run'].value:.3g} ms",
        gains="latency",
        at_most=amdahl(share),
    )


def prebuilt_engine(case: Case) -> Advice | None:
    """Loading takes more than half of a cold start and 0.5 s, and the engine compiles then.

    A CPU or CUDA session of ONNX Runtime has nothing that could be kept, and TensorRT's own
    engines are built before any start.
    """
    start = case.measurement.cold_start
    if start is None or start.load_ms < _SLOW_START_MS:
        return None
    total = start.total_ms
    engine, name = case.device.engine, case.device.name
    provider = PROVIDERS.get(engine)
    if start.load_ms <= _MOST * total or provider is None or not provider.has_context:
        return None
    return Advice(
        topic="start",
        what=f"Keep what {engine} compiles: `edgeclip build BUNDLE --device {name} --out FOLDER` "
        "writes EP contexts",
        evidence=f"loading takes {start.load_ms:.0f} of {total:.0f} ms of a cold start",
        gains="start",
        at_most=amdahl(start.load_ms / total),
    )


_MOST_LAYERS = 0.5  # of the time of all layers
_NEAR = 0.6  # of the roof: kernels rarely come closer outside the largest shapes
_MANY = 10  # layers
_NOTABLE = 0.1  # of the time of all layers
_TENSORRT_PRODUCTS = {"convolution", "gemm", "matrixmultiply"}
# Where profiling costs more than this, times of short layers are mostly its own.
_PROFILING = 1.5
_FUSE = "`edgeclip export STUDENT --device DEVICE` on the device itself tries rewrites"
_ISLANDS = {
    "Q/DQ": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    "Cast": ("Cast",),
    "Transpose": ("Transpose", "ReorderInput", "ReorderOutput"),
}
_MENDS = {
    "Q/DQ": "a quantized product between float layers pays for both ways: "
    "compare with `--precision fp32`",
    "Cast": "the engine converts where it has no kernel for the type: compare with "
    "`--precision fp32`",
    "Transpose": f"{_FUSE} such as merged projections and fused attention",
}


def smaller_model(case: Case) -> Advice | None:
    """Products that compute at more than 60% of their roof take most of the time.

    No setting makes those faster. int8 is named where its measured peak is higher and the
    same run has not tried it; its bound is the ratio of the peaks. Otherwise a student of
    half the layers is, which at most halves that time.
    """
    layers = _held_by(case, "compute")
    share = share_of_time(layers)
    if case.roofline is None or share <= _MOST_LAYERS:
        return None
    reached = sum((layer.share or 0) * layer.share_of_time for layer in layers) / share
    evidence = f"{percent(share)} of the time reaches {percent(reached)} of this machine's peak"
    own = peak_of(case.roofline, case.precision or "fp32")
    int8 = peak_of(case.roofline, "int8")
    if own and int8 and int8 > own and _may_try_int8(case):
        return Advice(
            topic="precision",
            what="Try int8: `edgeclip export STUDENT --precisions int8`, which is refused "
            "outside its quality gates",
            evidence=f"{evidence}, and int8's peak is {int8:.0f}, not {own:.0f} GFLOP/s",
            gains="latency",
            at_most=amdahl(share, int8 / own),
        )
    return Advice(
        topic="model",
        what="Only a smaller model makes this faster: `edgeclip distill --image-layers` and "
        "`--text-layers` (half of them is the bound here)",
        evidence=evidence,
        gains="latency",
        at_most=amdahl(share, 2),
    )


def smaller_weights(case: Case) -> Advice | None:
    """Products that wait for memory, at more than 60% of its bandwidth, take most of the time.

    int8 weights have a quarter of the bytes, fp16 half of them; on a CPU fp16 weights are
    made fp32 when they are loaded. What the same run has tried is not named.
    """
    layers = [item for item in _held_by(case, "memory") if item.op != "MultiHeadAttention"]
    share = share_of_time(layers)
    if share <= _MOST_LAYERS or case.precision not in ("fp32", "fp16"):
        return None
    tried = case.measured_precisions()
    half = case.precision == "fp32" and not case.device.on_cpu and "fp16" not in tried
    if half and "fp16" in case.device.precisions:
        precision, times = "fp16", 2.0
    elif _may_try_int8(case):
        stored_as_fp32 = case.precision == "fp32" or case.device.on_cpu
        precision, times = "int8", 4.0 if stored_as_fp32 else 2.0
    else:
        return None
    moved = max(item.achieved_gb_s or 0 for item in layers)
    return Advice(
        topic="precision",
        what=f"Make the weights smaller: `edgeclip export STUDENT --precisions {precision}`, "
        "which is refused outside its quality gates",
        evidence=f"{percent(share)} of the time goes to products that wait for memory, at up to "
        f"{moved:.3g} GB/s",
        gains="latency",
        at_most=amdahl(share, times),
    )


def short_layers(case: Case) -> Advice | None:
    """At least 10 layers too short to tell anything of take most of the time.

    Not where profiling makes the tower more than 1.5 times as slow: then it is the profiler.
    """
    layers = [item for item in case.distances if item.limit == "overhead"]
    share = share_of_time(layers)
    if len(layers) < _MANY or share <= _MOST_LAYERS or not _believable(case):
        return None
    return Advice(
        topic="short layers",
        what=f"Have fewer and larger layers: {_FUSE}, a larger batch shares what starting a "
        "layer costs, and one thread needs no waking",
        evidence=f"{len(layers)} layers that take less than 0.01 ms each have {percent(share)} "
        "of the time",
        gains="latency",
        at_most=amdahl(share),
    )


def islands(case: Case) -> Advice | None:
    """Nodes that only convert (Q/DQ, Cast or Transpose) take at least 10% of the time.

    Not where profiling makes the tower more than 1.5 times as slow.
    """
    found = {
        kind: [item for item in case.distances if item.op in operators]
        for kind, operators in _ISLANDS.items()
    }
    kind = max(found, key=lambda name: share_of_time(found[name]))
    layers, share = found[kind], share_of_time(found[kind])
    if share < _NOTABLE or not _believable(case):
        return None
    slowest = sorted(layers, key=lambda item: -item.ms)[:3]
    return Advice(
        topic="islands",
        what=f"Look at the {kind} nodes: {_MENDS[kind]}",
        evidence=f"{len(layers)} of them have {percent(share)} of the time, the slowest are "
        + ", ".join(f"{item.name} ({item.ms:.3g} ms)" for item in slowest),
        gains="latency",
        at_most=amdahl(share),
    )


def _held_by(case: Case, limit: Limit) -> list[LayerDistance]:
    """Products close to that side of their roof; none where the roof is too low.

    What is far above the roof of the memory has its data in a cache, and waits for nothing.
    """
    if case.above_the_roof() is not None:
        return []
    return [
        item
        for item in case.distances
        if item.limit == limit
        and _NEAR <= (item.share or 0) <= NOISE
        and (is_product(item.op) or item.op in _TENSORRT_PRODUCTS)
        and _told_by_engine(case)
    ]


def _told_by_engine(case: Case) -> bool:
    """Times of ONNX Runtime's nodes on a GPU are the host's, which goes on meanwhile."""
    return case.device.on_cpu or not case.device.engine.startswith("onnxruntime")


def _may_try_int8(case: Case) -> bool:
    return (
        case.precision not in (None, "int8")
        and "int8" in case.device.precisions
        and "int8" not in case.measured_precisions()
    )


def _believable(case: Case) -> bool:
    layers = case.measurement.layers
    if layers is None or not _told_by_engine(case):
        return False
    return sum(layer.ms for layer in layers.layers) <= _PROFILING * layers.plain_ms


_CLEAR = 0.05  # what differs by less is the same
_NEARLY_BEST = 0.95  # of the highest throughput: a larger batch only adds latency
_SPINNING = 1.5  # processor time of several threads, in times of what one thread needs
_PROFILE = "in a device profile (`edgeclip device --out mine.yaml`, then `--device mine.yaml`)"


def other_threads(case: Case) -> Advice | None:
    """The sweep at batch 1 has another number of threads that is faster, or fewer as fast.

    Faster: the intervals do not meet and the medians differ by more than 5%. As fast: the
    upper end lies at most 5% above the median of the threads in use.
    """
    points = case.by_threads()
    own = next((item for item in points if item.threads == case.threads), None)
    if own is None or own.threads is None:
        return None
    fastest = min(points, key=lambda item: item.p50_ms.value)
    if _clearly_faster(fastest, own):
        return Advice(
            topic="threads",
            what=f"Set `threads: {fastest.threads}` {_PROFILE}",
            evidence=f"batch 1 takes {_took(fastest)}, and {_took(own)}, on "
            f"{case.machine.cores} cores",
            gains="latency",
            at_most=own.p50_ms.value / fastest.p50_ms.value,
        )
    as_fast = [
        item
        for item in points
        if item.threads is not None
        and item.threads < own.threads
        and item.p50_ms.high <= (1 + _CLEAR) * own.p50_ms.value
    ]
    fewest = min(as_fast, key=lambda item: item.threads or 0, default=None)
    if fewest is None or fewest.threads is None:
        return None
    return Advice(
        topic="threads",
        what=f"Set `threads: {fewest.threads}` {_PROFILE}: it is as fast, and leaves the other "
        "processors to the rest of the program",
        evidence=f"batch 1 takes {_took(fewest)}, and {_took(own)}",
        gains="processor time",
        at_most=own.threads / fewest.threads,
    )


def spinning_threads(case: Case) -> Advice | None:
    """All threads together spend more than 1.5 times what one thread needs for the same work.

    Known only where the sweep has one thread at batch 1: waiting for each other by spinning,
    and waking up, is what they spend the rest on.
    """
    one = next((item for item in case.by_threads() if item.threads == 1), None)
    own = case.alone()
    if one is None or own is None or case.threads == 1:
        return None
    spent = 1e3 * case.measurement.cpu.process_s / case.measurement.latency.runs
    if spent <= _SPINNING * one.p50_ms.high:
        return None
    return Advice(
        topic="threads",
        what=f"Where processor time or energy counts, set `threads: 1` {_PROFILE}: "
        f"{case.threads} threads mostly wait for each other",
        evidence=f"a run costs {spent:.3g} ms of processor time with {case.threads} threads, and "
        f"{one.p50_ms.value:.3g} ms with one; latency would be {span(one.p50_ms, 'ms')} "
        f"in place of {own.p50_ms.value:.3g} ms",
        gains="processor time",
        at_most=spent / one.p50_ms.value,
    )


def larger_batch(case: Case) -> Advice | None:
    """Throughput rises by more than 5% for certain, in a batch that the latency bound allows.

    The bound is the device's `latency_budget_ms`, else that of the Server scenario, else none.
    Of the batches with at least 95% of the best throughput the smallest is taken.
    """
    points, alone = case.by_batch(), case.alone()
    bound = _latency_bound(case)
    allowed = [item for item in points if bound is None or item.p50_ms.value <= bound]
    if alone is None or not allowed:
        return None
    best = max(item.items_per_s.value for item in allowed)
    chosen = min(
        (item for item in allowed if item.items_per_s.value >= _NEARLY_BEST * best),
        key=lambda item: item.batch,
    )
    if chosen.items_per_s.low <= (1 + _CLEAR) * alone.items_per_s.high:
        return None
    condition = (
        f"if {chosen.p50_ms.value:.3g} ms for all of them are soon enough"
        if bound is None
        else f"which keeps the bound of {bound:g} ms"
    )
    return Advice(
        topic="batch",
        what=f"Run {chosen.batch} at a time (`edgeclip embed --batch-size {chosen.batch}`, "
        f"`edgeclip serve --max-batch {chosen.batch}`), {condition}",
        evidence=f"batch {chosen.batch} gives {span(chosen.items_per_s)} items a second, batch 1 "
        f"{span(alone.items_per_s)}",
        gains="throughput",
        at_most=chosen.items_per_s.value / alone.items_per_s.value,
    )


def batch_of_one(case: Case) -> Advice | None:
    """No batch gives more throughput than batch 1, and the largest gives clearly less.

    Clearly: the intervals do not meet, and it loses more than 5%.
    """
    points, alone = case.by_batch(), case.alone()
    others = [item for item in points if item.batch > 1]
    if alone is None or not others:
        return None
    largest = max(others, key=lambda item: item.batch)
    if any(item.items_per_s.high > alone.items_per_s.high for item in others):
        return None
    if largest.items_per_s.high >= (1 - _CLEAR) * alone.items_per_s.low:
        return None
    return Advice(
        topic="batch",
        what="Run one at a time (`edgeclip embed --batch-size 1`, `edgeclip serve --max-batch 1`)",
        evidence=f"batch 1 gives {span(alone.items_per_s)} items a second, batch {largest.batch} "
        f"only {span(largest.items_per_s)}",
        gains="throughput",
        at_most=alone.items_per_s.value / largest.items_per_s.value,
    )


def faster_precision(case: Case) -> Advice | None:
    """Another precision of the same bundle was more than 5% faster in the same run.

    The upper end of the paired ratio must lie below 0.95.
    """
    ratios = {
        item.identity.precision: _ratio(item, case.measurement)
        for item in case.siblings()
        if item.identity is not None
    }
    fastest = min(ratios, key=lambda name: ratios[name].value, default=None)
    if fastest is None or ratios[fastest].high >= 1 - _CLEAR:
        return None
    ratio, part = ratios[fastest], case.measurement.part
    return Advice(
        topic="precision",
        what=f"Run {fastest} in place of {case.precision} (`--precision {fastest}`); "
        f"`edgeclip eval --precision {fastest}` shows what it costs in quality",
        evidence=f"{fastest} takes {span(ratio)} of the time of {case.precision} on this machine "
        f"({part}, batch 1)",
        gains="latency",
        at_most=1 / ratio.value,
    )


def _took(point: SweepPoint) -> str:
    plural = "" if point.threads == 1 else "s"
    return f"{span(point.p50_ms, 'ms')} with {point.threads} thread{plural}"


def _clearly_faster(item: SweepPoint, own: SweepPoint) -> bool:
    return item.p50_ms.high < own.p50_ms.low and item.p50_ms.value < (1 - _CLEAR) * own.p50_ms.value


def _latency_bound(case: Case) -> float | None:
    if case.device.latency_budget_ms is not None:
        return case.device.latency_budget_ms
    return case.run.workload.server_bound_ms


def _ratio(item: Measurement, own: Measurement) -> Interval:
    """Time of `item` by that of `own`: paired by rounds, or of medians and their far ends."""
    ours, theirs = _samples(own), _samples(item)
    if ours and [len(runs) for runs in ours] == [len(runs) for runs in theirs]:
        return paired_ratio_of(theirs, ours)
    one, two = item.latency.p50_ms, own.latency.p50_ms
    return Interval(one.value / two.value, one.low / two.high, one.high / two.low)


def _samples(item: Measurement) -> list[Runs]:
    return [np.array(process) for process in item.samples_ms if process]


MOST = 3
_WORTH = 0.05  # of latency, throughput and so on; less is not worth a sentence
# Where two rules have the same topic, the earlier one knows more.
_RULES: tuple[Callable[[Case], Advice | None], ...] = (
    smaller_pictures,
    other_threads,
    spinning_threads,
    larger_batch,
    batch_of_one,
    faster_precision,
    smaller_model,
    smaller_weights,
    short_layers,
    islands,
    prebuilt_engine,
)


def advise(
    measurement: Measurement,
    roofline: Roofline | None,
    distances: Sequence[LayerDistance],
    device: DeviceProfile,
    machine: Machine,
    run: MeasurementRun,
) -> tuple[Advice, ...]:
    """At most three things to try, the largest possible gain first; none where none is sure.

    Whether the figures can be believed comes before everything else. Each rule states its
    condition where it is written. Gains are bounds (Amdahl's law, ratios of what was
    measured), not promises, and they do not add up.

    Args:
        measurement: what the advice is about.
        roofline: of the machine; None if it was not measured.
        distances: of the measurement's layers (see `distances`); empty if there are none.
        device: that ran it.
        machine: that ran it.
        run: that the measurement is of; its other measurements are compared with.
    """
    case = Case(
        measurement=measurement,
        roofline=roofline,
        distances=tuple(distances),
        device=device,
        machine=machine,
        run=run,
    )
    first = measure_again(case)
    by_topic: dict[str, Advice] = {}
    for rule in _RULES:
        advice = rule(case)
        if advice is not None and advice.saves >= _WORTH:
            by_topic.setdefault(advice.topic, advice)
    ranked = sorted(by_topic.values(), key=lambda item: -item.saves)
    return tuple([*([first] if first else []), *ranked][:MOST])
