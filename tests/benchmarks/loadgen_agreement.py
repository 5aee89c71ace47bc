"""Do our ways to take the time of one run agree with each other, and with MLPerf LoadGen's?

The built-in bundle's image tower, int8 and fp32, one thread, one ONNX Runtime session each.
In each round, in changing order: a bare loop around `session.run` (twice, which shows what the
machine itself adds), `measure_interleaved`, and LoadGen's SingleStream, of which our percentile
and the one in LoadGen's own log are taken. A ratio is the median over the rounds of a way's
median divided by the bare loop's.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, finish, options
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    round_order,
)
from edgeclip.profiles.measure.loadgen import run_scenario
from edgeclip.profiles.record.timing_statistics import paired_ratio
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime, session_options
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.towers.tower_runner import tower_feed

PRECISIONS: tuple[Precision, ...] = ("int8", "fp32")
BARE, AGAIN = "bare loop", "bare loop again"
INTERLEAVED, OURS, THEIRS = "measure_interleaved", "SingleStream, ours", "SingleStream, LoadGen's"
_BOUND = 3.0  # percent
_UNTIMED = 10


@dataclass(frozen=True, slots=True)
class Subject:
    """One session and what it is fed."""

    name: str
    session: Any
    feed: dict[str, NDArray[Any]]

    def run(self, _batch: NDArray[Any]) -> object:
        """As a `BenchmarkTarget` runs; the batch is the feed's."""
        return self.session.run(None, self.feed)

    @property
    def candidate(self) -> BenchmarkTarget:
        """For `measure_interleaved` and `run_scenario`."""
        return BenchmarkTarget(self.name, self.run, lambda size: np.zeros((size, 1)), threads=1)


def main() -> int:
    """Take the times in rounds, print a table."""
    args = options(__doc__ or "").parse_args()
    rounds, runs = (4, 50) if args.quick else (40, 200)
    subjects = [open_subject(precision) for precision in PRECISIONS]
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = [step for subject in subjects for step in ways(subject, runs, Path(folder))]
        for number in range(rounds):
            for at in round_order(len(steps), number):
                for key, median_ms in steps[at]().items():
                    found.setdefault(key, []).append(median_ms)
    print(f"{rounds} rounds of {runs} runs")
    print("tower  way                      median ms  ratio to the bare loop (95% interval)")
    bars = []
    for (name, way), medians in found.items():
        ratio = paired_ratio([np.array(medians)], [np.array(found[name, BARE])])
        print(
            f"{name:<6} {way:<24} {np.median(medians):8.4f}   "
            f"{ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})"
        )
        if way not in (BARE, AGAIN):
            bars.append(deviation_bar(name, way, ratio))
    return finish(bars, args.out)


def open_subject(precision: Precision) -> Subject:
    """The image tower in a session of its own, with one thread."""
    bundle = Bundle.open(EMOJI_BUNDLE)
    ort = import_onnxruntime()
    session = ort.InferenceSession(
        bundle.tower_path("image", precision),
        session_options(ort, 1),
        providers=["CPUExecutionProvider"],
    )
    pixels = bundle.manifest.tower("image").file(precision).pixels
    one = bundle.golden().inputs("image")[:1]
    return Subject(precision, session, tower_feed(one, "image", pixels, bundle.manifest.spec.image))


def ways(
    subject: Subject, runs: int, folder: Path
) -> list[Callable[[], dict[tuple[str, str], float]]]:
    """Functions that each take about `runs` times in some way; what they give is in ms."""
    single_ms = bare_ms(subject, runs)
    workload = Workload(
        name="agreement",
        description="one way of many",
        batch_sizes=(1,),
        min_warmup_runs=_UNTIMED,
        max_warmup_seconds=0.1,
        repeats=runs,
        seconds_per_batch=0.1,
        cold_starts=0,
        scenario_seconds=runs * single_ms / 1e3,
        scenario_queries=runs,
    )

    def interleaved() -> dict[tuple[str, str], float]:
        (measured,) = measure_interleaved([subject.candidate], workload, part="image")
        return {(subject.name, INTERLEAVED): measured.latency.p50_ms.value}

    def loadgen() -> dict[tuple[str, str], float]:
        found = run_scenario(
            "SingleStream", subject.candidate, workload, single_ms=single_ms, folder=folder
        )
        assert found.latency is not None
        assert found.loadgen_p50_ms is not None
        return {
            (subject.name, OURS): found.latency.p50_ms.value,
            (subject.name, THEIRS): found.loadgen_p50_ms,
        }

    return [
        lambda: {(subject.name, BARE): bare_ms(subject, runs)},
        lambda: {(subject.name, AGAIN): bare_ms(subject, runs)},
        interleaved,
        loadgen,
    ]


def bare_ms(subject: Subject, runs: int) -> float:
    """Median of a loop as anyone would write it."""
    session, feed = subject.session, subject.feed
    for _ in range(_UNTIMED):
        session.run(None, feed)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def deviation_bar(name: str, way: str, ratio: Interval) -> Bar:
    """How far the ratio is from 1, in percent."""
    low, high = sorted((abs(ratio.low - 1), abs(ratio.high - 1)))
    if ratio.low <= 1 <= ratio.high:
        low = 0.0
    value = 100 * abs(ratio.value - 1)
    title = way.replace(",", "").replace("'s", "").replace(" ", "_").lower()
    return Bar(
        name=f"agreement_{name}_{title}",
        value=value,
        direction="<=",
        bound=_BOUND,
        unit="%",
        interval=Interval(value, 100 * low, 100 * high),
    )


if __name__ == "__main__":
    sys.exit(main())
