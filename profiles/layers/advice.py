"""Advice: at most three things to try next, each supported by figures of the same run.

Each rule in `_RULES` returns None unless the measurements show its condition (its docstring) for
certain. Gains are bounds (Amdahl's law, measured ratios), no promises, and do not add up.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeclip.profiles.layers.node_costs import is_product
from edgeclip.profiles.layers.roofline import LayerDistance, Limit, layer_distances, peak_of
from edgeclip.profiles.record.measurement import Measurement, MeasurementRun
from edgeclip.profiles.record.timing_statistics import (
    RatioEstimate,
    estimate_paired_ratio,
    surely_below,
)
from edgeclip.runtime.console import interval_ends
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.providers import PROVIDERS
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

MOST = 3
MEASURE_AGAIN = "measure again"
_WORTH = 0.05  # of latency, throughput and so on: what differs by less is the same
_APART = 0.10  # of the sweep's times with other threads: each is of a single process
_NEAR, _NOISE = 0.6, 1.1  # of a roof: kernels rarely come closer; what is above is not held by it
_PROFILING = 1.5  # where profiling costs more than this, times of short layers are mostly its own
_SET = "in a device profile (`edgeclip device --out mine.yaml`, then `--device mine.yaml`)"
_FUSE = "`edgeclip export STUDENT --device DEVICE` on the device itself tries rewrites"
_EXPORT = "`edgeclip export STUDENT --precisions {}`, which is refused outside its quality gates"
# Nodes that only convert: operators, and what helps.
_QDQ = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_TRANSPOSE = ("Transpose", "ReorderInput", "ReorderOutput")
_CONVERSIONS = {
    "Q/DQ": (_QDQ, "a quantized product between float layers pays for both ways; compare fp32"),
    "Cast": (("Cast",), "the engine converts where it has no kernel for the type; compare fp32"),
    "Transpose": (_TRANSPOSE, f"{_FUSE} such as merged projections and fused attention"),
}


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try next.

    Attributes:
        topic: topic of the rule, such as "threads".
        gains: what becomes better.
        at_most: how many times better, a bound and no promise; None where there is none.
        what: what to do, in one sentence with the command or setting that does it.
        evidence: the figures that say so.
    """

    topic: str
    gains: Literal["certainty", "latency", "throughput", "processor time", "start"]
    at_most: float | None
    what: str
    evidence: str

    @property
    def saves(self) -> float:
        """The largest share of what there is now that can be saved, 0 to 1."""
        return 0.0 if self.at_most is None else max(0.0, 1 - 1 / self.at_most)


def advise(run: MeasurementRun, item: Measurement) -> tuple[Advice, ...]:
    """Return at most three things to try for a measurement, the largest possible gain first.

    Doubts about the figures come first. Of rules of one topic the first that applies counts.
    Nothing is said of a run without a device profile.
    """
    if run.device is None:
        return ()
    case = _Case(run, item, run.device)
    by_topic: dict[str, Advice] = {}
    for rule in _RULES:
        advice = rule(case)
        if advice is not None and advice.saves >= _WORTH:
            by_topic.setdefault(advice.topic, advice)
    doubt = _measure_again(case)
    ranked = sorted(by_topic.values(), key=lambda advice: -advice.saves)
    return tuple([*([doubt] if doubt else []), *ranked][:MOST])


def amdahl(share: float, times: float = float("inf")) -> float:
    """How many times faster all becomes when `share` of it becomes `times` as fast.

    Source: Amdahl, "Validity of the single processor approach to achieving large scale
    computing capabilities", AFIPS 1967.
    """
    share = min(share, 0.999)  # 1 would promise an endless gain
    return 1 / (1 - share + share / times)


class _Case:
    """A measurement with what is known around it.

    Attributes:
        threads, precision: threads of the engine, and precision that ran; None for a file of
            someone else's.
        by_threads: the sweep at batch 1.
        by_batch: the sweep with the threads of the measurement.
        others: the same part of the same bundle on the same engine in other precisions.
        layers: distances; none where times are the profiler's, or the host's beside a GPU.
    """

    def __init__(self, run: MeasurementRun, item: Measurement, device: DeviceProfile) -> None:
        self.run, self.item, self.device = run, item, device
        own, sweep = item.identity, item.sweep
        self.threads = device.threads if own is None else own.threads
        self.precision = None if own is None else own.precision
        self.by_threads = {at.threads: at for at in sweep if at.batch == 1 and at.threads}
        by_batch = {at.batch: at for at in sweep if at.threads == self.threads}
        self.by_batch = by_batch or {at.batch: at for at in sweep if at.threads is None}
        self.others: dict[Precision, Measurement] = {}
        for each in run.measurements:
            other = None if each.identity is None else each.identity.precision
            if self.precision and other not in (None, self.precision) and _alike(each, item):
                self.others[other] = each
        self.layers: tuple[LayerDistance, ...] = ()
        told = device.on_cpu or not device.engine.startswith("onnxruntime")
        found = item.layers
        if found is None or run.roofline is None or not told:
            return
        if sum(layer.ms for layer in found.layers) <= _PROFILING * found.plain_ms:
            self.layers = layer_distances(found, run.roofline, self.precision or "fp32")

    def may_try_int8(self) -> bool:
        """Whether the device has int8, and this run has not measured it."""
        tried = {self.precision, *self.others}
        return self.precision is not None and "int8" in {*self.device.precisions} - tried

    def above_the_roof(self) -> float | None:
        """How many times the peak layers computed at: the peak was measured too low then."""
        above = [x for x in self.layers if x.limit == "compute" and (x.share or 0) > _NOISE]
        return max(x.share or 0 for x in above) if _share(above) >= _WORTH else None

    def products_held_by(self, limit: Limit) -> list[LayerDistance]:
        """Products close to that side of their roof; none where the roof is too low."""
        if self.above_the_roof() is not None:
            return []
        products = (x for x in self.layers if x.limit == limit and is_product(x.layer.op))
        return [x for x in products if _NEAR <= (x.share or 0) <= _NOISE]


def _alike(one: Measurement, two: Measurement) -> bool:
    a, b = one.identity, two.identity
    if a is None or b is None or one.part != two.part:
        return False
    same = (a.sha256, a.engine, a.threads) == (b.sha256, b.engine, b.threads)
    return same and (one.part != "text" or one.input_shape == two.input_shape)


def _share(layers: Iterable[LayerDistance]) -> float:
    return sum(each.layer.share for each in layers)


def _span(value: Interval) -> str:
    return f"{value.value:.3g} [{interval_ends(value, '{:.3g}'.format, ', ')}]"


def _measure_again(case: _Case) -> Advice | None:
    """The machine, this measurement or the peaks were disturbed; unknown (None) is no reason."""
    item, roof, watched = case.item, case.run.roofline, case.run.interference
    reasons: list[str] = []
    if watched is not None and (watched.throttled or watched.disturbed):
        slowed = "a processor was slowed for its heat or supply"
        reasons += watched.reasons or [slowed if watched.throttled else "other work disturbed it"]
    if item.contended:
        shares = (("waiting", item.cpu.waiting_share), ("stolen", item.cpu.steal_share))
        known = ", ".join(f"{share:.0%} {name}" for name, share in shares if share is not None)
        reasons.append(f"processor time was denied to {item.name}{known and ': ' + known}")
    if not item.warm_up.settled:
        after = f"the median still moved after {item.warm_up.runs} runs"
        reasons.append(f"{after}: raise max_warmup_seconds in the workload")
    if roof is not None and roof.interference is not None:
        reasons += [f"{why} while peaks were measured" for why in roof.interference.reasons]
    if (above := case.above_the_roof()) is not None:
        reasons.append(f"layers computed {above:.1f} times as fast as the peak that was measured")
    what = "Measure again before you believe anything: close what else runs, let the machine cool, "
    what += "and repeat the command of this run"
    evidence = "; ".join(dict.fromkeys(reasons))
    return Advice(MEASURE_AGAIN, "certainty", None, what, evidence) if reasons else None


def _smaller_pictures(case: _Case) -> Advice | None:
    """Reading, decoding and resizing take more than half of an answer, and more than running."""
    stages = {item.name: item.ms for item in case.item.stages}
    before = {name: stages[name] for name in ("read", "decode", "resize") if name in stages}
    total, run = sum(ms.value for ms in stages.values()), stages.get("run")
    share = sum(ms.value for ms in before.values()) / total if total > 0 else 0.0
    if run is None or share <= 0.5 or sum(ms.low for ms in before.values()) <= run.high:
        return None
    what = "Give smaller files, JPEG above all, which is reduced while it is decoded, or camera "
    what += "frames that have the tower's size already (`Encoder.encode_pixels`)"
    parts = "".join(f"{name} {ms.value:.3g} ms, " for name, ms in before.items())
    evidence = f"{share:.0%} of {total:.3g} ms pass before the tower runs: {parts}run "
    return Advice("pictures", "latency", amdahl(share), what, f"{evidence}{run.value:.3g} ms")


def _other_threads(case: _Case) -> Advice | None:
    """Another number of threads is faster at batch 1, or fewer are as fast, or spend far less.

    Faster, as fast: by the ends of intervals, and faster by 10%, because each number of threads
    ran in one process, whose interval does not hold what another would add. Far less: all threads
    together spend more than 1.5 times the processor time of one, the rest being spinning and
    waking up.
    """
    ms = {threads: point.p50_ms for threads, point in case.by_threads.items()}
    if (own := ms.get(case.threads)) is None:
        return None
    fastest = min(ms, key=lambda threads: ms[threads].value)
    took = {n: f"{_span(ms[n])} ms with {n} thread{'s' * (n > 1)}" for n in ms}
    if ms[fastest].high < own.low and ms[fastest].value < (1 - _APART) * own.value:
        what, gain = f"Set `threads: {fastest}` {_SET}", own.value / ms[fastest].value
        evidence = f"batch 1 takes {took[fastest]}, and {took[case.threads]}, on "
        evidence += f"{case.run.machine.cores} cores"
        return Advice("threads", "latency", gain, what, evidence)
    as_fast = [n for n in ms if n < case.threads and ms[n].high <= (1 + _WORTH) * own.value]
    if as_fast:
        what = f"Set `threads: {min(as_fast)}` {_SET}: it is as fast, and leaves the other "
        what += "processors to the rest of the program"
        evidence = f"batch 1 takes {took[min(as_fast)]}, and {took[case.threads]}"
        return Advice("threads", "processor time", case.threads / min(as_fast), what, evidence)
    spent = 1e3 * case.item.cpu.process_s / case.item.latency.runs
    if 1 not in ms or case.threads == 1 or spent <= 1.5 * ms[1].high:
        return None
    what = f"Where processor time or energy counts, set `threads: 1` {_SET}: {case.threads} "
    what += "threads mostly wait for each other"
    evidence = f"a run costs {spent:.3g} ms of processor time with {case.threads} threads; batch 1 "
    evidence += f"takes {took[1]}, and {took[case.threads]}"
    return Advice("threads", "processor time", spent / ms[1].value, what, evidence)


def _other_batch(case: _Case) -> Advice | None:
    """Throughput surely rises by more than 5% in a batch within the latency bound, or falls.

    The smallest batch with at least 95% of the best throughput counts; the bound is the device's
    `latency_budget_ms`, else that of the Server scenario, else none.
    """
    points, bound = case.by_batch, case.device.latency_budget_ms
    bound = case.run.workload.server_bound_ms if bound is None else bound
    if 1 not in points or len(points) == 1:
        return None
    alone, largest = points[1].items_per_s, points[max(points)].items_per_s
    allowed = [x for x in points.values() if bound is None or x.p50_ms.value <= bound]
    best = max((x.items_per_s.value for x in allowed), default=0.0)
    good = [x for x in allowed if x.items_per_s.value >= (1 - _WORTH) * best]
    found = min(good, key=lambda x: x.batch, default=points[1])
    rate, count = found.items_per_s, found.batch
    if rate.low > (1 + _WORTH) * alone.high:
        soon = f"if {found.p50_ms.value:.3g} ms for all of them are soon enough"
        what = f"Run {count} at a time (`edgeclip embed --batch-size {count}`, `edgeclip serve "
        what += f"--max-batch {count}`), "
        what += soon if bound is None else f"which keeps the bound of {bound:g} ms"
        evidence = f"batch {count} gives {_span(rate)} items a second, batch 1 {_span(alone)}"
        return Advice("batch", "throughput", rate.value / alone.value, what, evidence)
    most = max(x.items_per_s.high for x in points.values())
    if most > alone.high or largest.high >= (1 - _WORTH) * alone.low:
        return None
    what = "Run one at a time (`edgeclip embed --batch-size 1`, `edgeclip serve --max-batch 1`)"
    evidence = f"batch 1 gives {_span(alone)} items a second, batch {max(points)} {_span(largest)}"
    return Advice("batch", "throughput", alone.value / largest.value, what, evidence)


def _faster_precision(case: _Case) -> Advice | None:
    """Another precision of the same bundle was surely more than 5% faster in the same run.

    By Student's t over the processes, for all precisions together; one process tells nothing.
    """
    ratios: dict[Precision, RatioEstimate] = {}
    samples = [np.array(runs) for runs in case.item.samples_ms]
    for name, item in case.others.items():
        theirs = [np.array(runs) for runs in item.samples_ms]
        if all(map(len, samples)) and list(map(len, samples)) == list(map(len, theirs)):
            ratios[name] = estimate_paired_ratio(theirs, samples)
    surely = surely_below(list(ratios.values()), 1 - _WORTH)
    faster = [name for name, sure in zip(ratios, surely, strict=True) if sure]
    best = min(faster, key=lambda name: ratios[name].value, default=None)
    if best is None:
        return None
    what = f"Run {best} in place of {case.precision} (`--precision {best}`); "
    what += f"`edgeclip eval --precision {best}` shows what it costs in quality"
    evidence = f"{best} takes {_span(ratios[best].interval)} of the time of {case.precision} on "
    evidence += f"this machine ({case.item.part}, batch 1)"
    return Advice("precision", "latency", 1 / ratios[best].value, what, evidence)


def _smaller_model(case: _Case) -> Advice | None:
    """Products that compute at more than 60% of their roof take most of the time.

    int8 is bounded by the ratio of the peaks; a student of half the layers halves that time.
    """
    layers, roof = case.products_held_by("compute"), case.run.roofline
    share = _share(layers)
    if roof is None or share <= 0.5:
        return None
    reached = sum((x.share or 0) * x.layer.share for x in layers) / share
    evidence = f"{share:.0%} of the time reaches {reached:.0%} of this machine's peak"
    own, int8 = peak_of(roof, case.precision or "fp32"), peak_of(roof, "int8")
    if own and int8 and int8 > own and case.may_try_int8():
        evidence += f", and int8's peak is {int8:.0f}, not {own:.0f} GFLOP/s"
        what = f"Try int8: {_EXPORT.format('int8')}"
        return Advice("precision", "latency", amdahl(share, int8 / own), what, evidence)
    what = "Only a smaller model makes this faster: `edgeclip distill --image-layers` and "
    what += "`--text-layers` (half of them is the bound here)"
    return Advice("model", "latency", amdahl(share, 2), what, evidence)


def _smaller_weights(case: _Case) -> Advice | None:
    """Products that wait for memory, at more than 60% of its bandwidth, take most of the time.

    int8 weights have a quarter of the bytes, fp16 half; a CPU loads fp16 weights as fp32.
    """
    layers = [x for x in case.products_held_by("memory") if x.layer.op != "MultiHeadAttention"]
    share, own, on_cpu = _share(layers), case.precision, case.device.on_cpu
    if share <= 0.5 or own not in ("fp32", "fp16"):
        return None
    halves = own == "fp32" and not on_cpu and "fp16" in {*case.device.precisions} - {*case.others}
    if not halves and not case.may_try_int8():
        return None
    smaller, times = ("fp16", 2) if halves else ("int8", 4 if own == "fp32" or on_cpu else 2)
    gb_s = max((x.layer.bytes or 0) / x.layer.ms / 1e6 for x in layers)
    what = f"Make the weights smaller: {_EXPORT.format(smaller)}"
    evidence = f"{share:.0%} of the time goes to products that wait for memory, at up to "
    evidence += f"{gb_s:.3g} GB/s"
    return Advice("precision", "latency", amdahl(share, times), what, evidence)


def _short_layers(case: _Case) -> Advice | None:
    """At least 10 layers too short to tell anything of take most of the time."""
    layers = [x for x in case.layers if x.limit == "overhead"]
    share, count = _share(layers), len(layers)
    what = f"Have fewer and larger layers: {_FUSE}, a larger batch shares what starting a layer "
    what += "costs, and one thread needs no waking"
    evidence = f"{count} layers that take less than 0.01 ms each have {share:.0%} of the time"
    found = Advice("short layers", "latency", amdahl(share), what, evidence)
    return found if count >= 10 and share > 0.5 else None


def _conversions(case: _Case) -> Advice | None:
    """Nodes that only convert (Q/DQ, Cast or Transpose) take at least 10% of the time."""
    shares = {
        kind: _share(x for x in case.layers if x.layer.op in operators)
        for kind, (operators, _) in _CONVERSIONS.items()
    }
    kind = max(shares, key=lambda name: shares[name])
    operators, remedy = _CONVERSIONS[kind]
    layers = [x.layer for x in case.layers if x.layer.op in operators]
    slowest = sorted(layers, key=lambda layer: -layer.ms)[:3]
    named = ", ".join(f"{layer.name} ({layer.ms:.3g} ms)" for layer in slowest)
    evidence = f"{len(layers)} of them have {shares[kind]:.0%} of the time, the slowest are {named}"
    what = f"Look at the {kind} nodes: {remedy}"
    found = Advice("conversions", "latency", amdahl(shares[kind]), what, evidence)
    return found if shares[kind] >= 0.1 else None


def _prebuilt_engine(case: _Case) -> Advice | None:
    """Loading takes more than half of a cold start and 0.5 s, and the engine compiles then.

    A CPU or CUDA session has nothing to keep; TensorRT's engines are built before any start.
    """
    start, device = case.item.cold_start, case.device
    provider = PROVIDERS.get(device.engine)
    if start is None or provider is None or not provider.has_context:
        return None
    if start.load_ms < 500 or start.load_ms <= 0.5 * start.total_ms:
        return None
    what = f"Keep what {device.engine} compiles: `edgeclip build BUNDLE --device {device.name} "
    what += "--out FOLDER` writes EP contexts"
    evidence = f"loading takes {start.load_ms:.0f} of {start.total_ms:.0f} ms of a cold start"
    return Advice("start", "start", amdahl(start.load_ms / start.total_ms), what, evidence)


# Where two rules have the same topic, the earlier one knows more.
_RULES: tuple[Callable[[_Case], Advice | None], ...] = (
    *(_smaller_pictures, _other_threads, _other_batch, _faster_precision, _smaller_model),
    *(_smaller_weights, _short_layers, _conversions, _prebuilt_engine),
)
