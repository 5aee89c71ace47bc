"""Do our ways to take the time of one run agree with each other, and with MLPerf LoadGen's?

The built-in bundle's image tower, int8 and fp32, one thread, one ONNX Runtime session each.
In each round, in changing order: a bare loop around `session.run`, `measure_interleaved`, and
LoadGen's SingleStream, of which our percentile and the one in LoadGen's own log are taken. A ratio
is the median over the rounds of a way's median divided by the bare loop's.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from _bars import EMOJI_BUNDLE, Rule, finish, hold, options

from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    round_order,
)
from edgeclip.profiles.measure.loadgen import run_scenario
from edgeclip.profiles.record.timing_statistics import estimate_mean_log
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import columns
from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime, session_options
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import tower_feed

BARS: dict[str, Rule] = {"agreement_*": ("<=", 3.0, "%")}
KEPT_MODELS = ("export/emoji_bundle",)

PRECISIONS: tuple[Precision, ...] = ("int8", "fp32")
BARE, INTERLEAVED = "bare loop", "measure_interleaved"
OURS, THEIRS = "SingleStream, ours", "SingleStream, LoadGen's"
_UNTIMED = 10
Medians = dict[tuple[Precision, str], float]  # ms, by precision and way


def ways(precision: Precision, runs: int, folder: Path) -> list[Callable[[], Medians]]:
    """Functions that each run the image tower about so many times in some way, in one session."""
    bundle, ort = Bundle.open(EMOJI_BUNDLE), import_onnxruntime()
    path, cpu = bundle.tower_path("image", precision), ["CPUExecutionProvider"]
    session = ort.InferenceSession(path, session_options(ort, 1), providers=cpu)
    pixels = bundle.manifest.tower("image").file(precision).pixels
    one, spec = bundle.golden().inputs("image")[:1], bundle.manifest.spec.image
    feed = tower_feed(one, "image", pixels, spec)

    def bare_ms() -> float:
        """Median of a loop as anyone would write it."""
        times = []
        for _ in range(_UNTIMED):
            session.run(None, feed)
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times))

    single_ms = bare_ms()
    target = BenchmarkTarget(
        precision, lambda _: session.run(None, feed), lambda size: np.zeros((size, 1)), threads=1
    )
    workload = replace(
        TUNING_WORKLOAD,
        min_warmup_runs=_UNTIMED,
        max_warmup_seconds=0.1,
        repeats=runs,
        scenario_seconds=runs * single_ms / 1e3,
        scenario_queries=runs,
    )

    def interleaved() -> Medians:
        (measured,) = measure_interleaved([target], workload, part="image")
        return {(precision, INTERLEAVED): measured.latency.p50_ms.value}

    def loadgen() -> Medians:
        found = run_scenario("SingleStream", target, workload, single_ms=single_ms, folder=folder)
        assert found.latency is not None
        assert found.loadgen_p50_ms is not None
        ours = found.latency.p50_ms.value
        return {(precision, OURS): ours, (precision, THEIRS): found.loadgen_p50_ms}

    return [lambda: {(precision, BARE): bare_ms()}, interleaved, loadgen]


def deviation(ratio: Interval) -> Interval:
    """How far a ratio is from 1, in percent."""
    low, high = sorted((abs(ratio.low - 1), abs(ratio.high - 1)))
    inside = ratio.low <= 1 <= ratio.high
    return Interval(100 * abs(ratio.value - 1), 0.0 if inside else 100 * low, 100 * high)


def main() -> int:
    args = options(__doc__).parse_args()
    rounds, runs = (4, 50) if args.quick else (40, 200)
    found: dict[tuple[Precision, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = [step for item in PRECISIONS for step in ways(item, runs, Path(folder))]
        for number in range(rounds):
            for at in round_order(len(steps), number):
                for key, median_ms in steps[at]().items():
                    found.setdefault(key, []).append(median_ms)
    head = ("tower", "way", "median ms", "of the bare loop", "low", "high")
    cells, bars = list[tuple[str, ...]]([head]), []
    for (name, way), medians in found.items():
        ratio = estimate_mean_log(np.array(medians) / np.array(found[name, BARE])).interval
        ends = (f"{value:.4f}" for value in (ratio.value, ratio.low, ratio.high))
        cells.append((name, way, f"{np.median(medians):.4f}", *ends))
        if way != BARE:
            title = way.replace(",", "").replace("'s", "").replace(" ", "_").lower()
            bars.append(hold(BARS, f"agreement_{name}_{title}", deviation(ratio)))
    print(f"{rounds} rounds of {runs} runs\n{columns(cells, left=2)}")
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
