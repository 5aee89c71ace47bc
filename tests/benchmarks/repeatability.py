"""Two profiles of one bundle agree, and a planted slowdown is found where there is one.

Each profile is what `edgeclip profile` does with the workload `ci`: fresh processes, one after
the other, in which the subjects and the yardstick take turns. Every two profiles in succession
are a pair. In each the subject has a double that spins for a tenth of its own time after each
run. Set against the plain subject of the profile before, the double is a change that costs 10%,
and the plain subject is one that costs nothing; the gate judges both, with a slowdown of 5%
tolerated.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, Rule, at_least, at_most, finish, options, say
from numpy.typing import NDArray

from edgeclip.profiles.compare.compare_runs import Comparison, compare_runs
from edgeclip.profiles.compare.regression_gate import regression_gate
from edgeclip.profiles.measure import benchmark_worker, worker_client
from edgeclip.profiles.measure.interleaved_benchmark import (
    run_interleaved_benchmark,
    to_measurements,
)
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.record.measurement import MeasurementRun, measurement_run
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share
from edgeclip.runtime.stats.three_outcomes import Outcome

_PLANTED, _TOLERATED = 0.10, 0.05
_NAME, _SLOWED = "student", "slowed student"
_WORKER = "EDGECLIP_SLOWED_WORKER"  # set: this file is the benchmark worker

BARS: dict[str, Rule] = {
    "repeatability_profiles_agree": (">=", 0.95, ""),
    "repeatability_planted_found": (">=", 0.95, ""),
    "repeatability_nothing_failed": ("<=", 0.05, ""),
}
KEPT_MODELS = ("export/emoji_bundle",)


def open_slowed(spec: SubjectSpec, *, bundle: Bundle | None = None) -> OpenSubject:
    """Open a subject; one of that name spins for a share of its time after each run."""
    found = open_subject(spec, bundle=bundle)
    if spec.name != _SLOWED:
        return found
    run = found.target.run

    def slower(batch: NDArray[Any]) -> object:
        start = time.perf_counter()
        result = run(batch)
        end = time.perf_counter()
        until = end + _PLANTED * (end - start)
        while time.perf_counter() < until:
            pass
        return result

    return replace(found, target=replace(found.target, run=slower))


def profile() -> tuple[MeasurementRun, MeasurementRun]:
    """Measure the built-in bundle's image tower: as it is, and the slowed one in its place."""
    workload, device, bundle = load_workload("ci"), load_device(THIS_MACHINE), str(EMOJI_BUNDLE)
    specs = [
        SubjectSpec(name=name, part="image", device=device, bundle=bundle, precision="int8")
        for name in (_NAME, _SLOWED)
    ]
    result = run_interleaved_benchmark(specs, workload, memory=False)
    plain, slowed = (
        replace(
            measurement_run([replace(item, name=_NAME)], workload=workload, command="a benchmark"),
            yardstick=result.yardstick,
        )
        for item in to_measurements(result)
    )
    return plain, slowed


def outcome(comparison: Comparison) -> Outcome:
    return regression_gate([comparison], _TOLERATED).outcome


def _share(hits: Sequence[bool]) -> Interval:
    return estimate_share(np.array(hits)).interval


def main() -> int:
    args = options(__doc__).parse_args()
    os.environ[_WORKER] = "1"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    worker_client._MODULE = Path(__file__).stem
    profiles, count = [], 4 if args.quick else 80
    for number in range(count):
        profiles.append(profile())
        say(f"profile {number + 1} of {count}")
    nothing, planted = [], []
    cells = [("baseline ms", "now ms", "ratio", "judged", "planted", "judged")]
    for (baseline, _), (plain, slowed) in zip(profiles[::2], profiles[1::2], strict=True):
        same, other = (compare_runs(now, baseline)[0] for now in (plain, slowed))
        nothing.append(same)
        planted.append(other)
        ms = (f"{same.baseline_ms.value:.3f}", f"{same.now_ms.value:.3f}")
        ratios = (f"{same.ratio.value:.3f}", outcome(same))
        cells.append((*ms, *ratios, f"{other.ratio.value:.3f}", outcome(other)))
    print(columns(cells, left=0))
    agree = [  # the intervals that both report have a value in common
        item.now_ms.low <= item.baseline_ms.high and item.baseline_ms.low <= item.now_ms.high
        for item in nothing
    ]
    found = _share([outcome(item) == "failed" for item in planted])
    failed = _share([outcome(item) == "failed" for item in nothing])
    bars = [
        at_least("repeatability_profiles_agree", _share(agree), 0.95),
        at_least("repeatability_planted_found", found, 0.95),
        at_most("repeatability_nothing_failed", failed, 0.05),
    ]
    return finish(bars, args.out)


if __name__ == "__main__":
    if _WORKER in os.environ:
        vars(benchmark_worker)["open_subject"] = open_slowed
        sys.exit(benchmark_worker.main())
    sys.exit(main())
