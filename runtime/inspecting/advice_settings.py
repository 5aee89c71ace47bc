"""Advice on what a setting changes: threads, batch, precision."""

import numpy as np

from edgeclip.runtime.inspecting.advice_case import Advice, Case, span
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.measurement import Measurement, SweepPoint
from edgeclip.runtime.measuring.timing_statistics import Runs, paired_ratio_of

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
