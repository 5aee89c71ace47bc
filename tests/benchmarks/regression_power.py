"""How often the regression gate is wrong, and how often it decides: simulated profiles.

Every profile is drawn by a law that is known, and judged by the product's own `compare_runs` and
`regression_gate`, with 5% tolerated. A run takes its process's fastest time, or longer by what
other programs add, 8% in the median; processes differ by 1.5%, the machine's speed wanders by 5%
from process to process, and a yardstick shares it. Four subjects are judged together. Held are

- "failed" among equals, and where all are slower by exactly the bound: in 5% over all subjects;
- "passed" where the typical times, the fastest runs, or both are slower by exactly the bound: in 5%
  of the subjects each;
- "surely faster" among three equals of fp32, as a precision is selected: in 2.5%, where loads of an
  engine differ by 0, 2 and 5%.

What is decided of true slowdowns is told, not held: it depends on the noise, which is assumed.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from _bars import Bar, Rule, finish, hold, options, say
from numpy.typing import NDArray

from edgeclip.profiles.compare.compare_runs import compare_runs
from edgeclip.profiles.compare.regression_gate import GateVerdict, regression_gate
from edgeclip.profiles.measure.interleaved_loads import LOADS
from edgeclip.profiles.record.measurement import Latency, MeasurementRun
from edgeclip.profiles.record.timing_statistics import Runs, estimate_paired_ratio, surely_below
from edgeclip.runtime.console import columns, percent
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share
from edgeclip.runtime.stats.three_outcomes import Outcome
from tests.profiles.run_cases import measurement, run_of, yardstick

BARS: dict[str, Rule] = {  # bounds are a level and what the simulation's size adds to it
    "failed_at_*": ("<=", None, "of the runs"),
    "passed_*": ("<=", None, "of the subjects"),
    "surely_faster_*": ("<=", None, "of the selections"),
}
TOLERATED, LEVEL, SURELY = 0.05, 0.05, 0.025
BOUND = 1 + TOLERATED
PROCESSES, LOAD_EFFECTS = (5, 8, 10), (0.0, 0.02, 0.05)
SLOWDOWNS = (0.0, TOLERATED / 2, 1.5 * TOLERATED, 2 * TOLERATED)
_SUBJECTS, _ROUNDS = 4, 60
_APART, _WANDERING = 0.015, 0.05  # between processes: of a subject, and of the machine
_UNDISTURBED, _ADDED = 0.3, 0.08  # share of runs; what the median run takes longer than the fastest
_RUNS_OF_A_LOAD, _RUN_NOISE, _CANDIDATES = 15, 0.05, 3
_UNUSED = Interval(1.0, 1.0, 1.0)
_LATENCY = Latency(  # the gate takes the runs themselves
    runs=1, p50_ms=_UNUSED, p90_ms=None, p95_ms=None, p99_ms=None, p99_9_ms=None
)


@dataclass(frozen=True, slots=True)
class Slower:
    """True ratios of now to baseline: of the median run, and of the fastest of a process."""

    typical: float = 1.0
    fastest: float = 1.0


def drawn_runs(rng: np.random.Generator, count: int, slower: Slower) -> Runs:
    """Run times without the machine's speed: [processes, rounds], the fastest near 1."""
    added = slower.typical * (1 + _ADDED) / slower.fastest - 1
    median = -log(1 - (0.5 - _UNDISTURBED) / (1 - _UNDISTURBED))  # of the exponential part
    longer = rng.exponential(added / median, (count, _ROUNDS))
    longer[rng.random(longer.shape) < _UNDISTURBED] = 0.0
    own = rng.normal(0, _APART, (count, 1))
    return np.asarray(slower.fastest * (1 + longer) * np.exp(own))


def profile(rng: np.random.Generator, count: int, slower: Slower) -> MeasurementRun:
    """A profile of four subjects and a yardstick in `count` processes."""
    machine = np.exp(np.cumsum(rng.normal(0, _WANDERING, count)))[:, None]
    subjects = [
        measurement(
            f"subject {number}",
            list(machine * drawn_runs(rng, count, slower)),
            latency=_LATENCY,
        )
        for number in range(_SUBJECTS)
    ]
    stick = machine * np.exp(rng.normal(0, 0.003, (count, _ROUNDS)))
    return run_of(*subjects, yardstick=yardstick(list(stick)))


def verdicts(
    rng: np.random.Generator, count: int, slower: Slower, repetitions: int
) -> list[GateVerdict]:
    return [
        regression_gate(
            compare_runs(profile(rng, count, slower), profile(rng, count, Slower())), TOLERATED
        )
        for _ in range(repetitions)
    ]


def share_of_runs(found: list[GateVerdict], outcome: Outcome) -> Interval:
    return estimate_share(np.array([item.outcome == outcome for item in found])).interval


def share_of_subjects(found: list[GateVerdict], outcome: Outcome) -> Interval:
    """Subjects of one run share the yardstick, and are a cluster."""
    hits = np.array([[one.outcome == outcome for one in item.judged] for item in found])
    return estimate_share(hits.ravel(), np.repeat(np.arange(len(hits)), hits.shape[1])).interval


def held(name: str, value: Interval, level: float, repetitions: int) -> Bar:
    """A bar at a level, and three standard errors of the simulation above it."""
    return hold(BARS, name, value, level + 3 * sqrt(level * (1 - level) / repetitions))


def wrong(rng: np.random.Generator, count: int, repetitions: int) -> Iterator[Bar]:
    """False verdicts at a number of processes."""
    for words, slower in (("equals", Slower()), ("the_bound", Slower(BOUND, BOUND))):
        found = verdicts(rng, count, slower, repetitions)
        name = f"failed_at_{words}_{count}_processes"
        yield held(name, share_of_runs(found, "failed"), LEVEL, repetitions)
        if words == "the_bound":
            name = f"passed_both_at_the_bound_{count}_processes"
            yield held(name, share_of_subjects(found, "passed"), LEVEL, repetitions)
    for words, slower in (("typical", Slower(typical=BOUND)), ("fastest", Slower(fastest=BOUND))):
        found = verdicts(rng, count, slower, repetitions)
        name = f"passed_{words}_at_the_bound_{count}_processes"
        yield held(name, share_of_subjects(found, "passed"), LEVEL, repetitions)


def gate_errors(repetitions: int) -> dict[str, float]:
    """How often the gate is wrong with 5 and 10 processes, by the names of the bars."""
    rng = np.random.default_rng(1)
    return {bar.name: bar.value for count in (5, 10) for bar in wrong(rng, count, repetitions)}


def decided(rng: np.random.Generator, count: int, repetitions: int) -> Iterator[tuple[str, ...]]:
    """A row for each true slowdown: how many subjects passed, failed, and stayed undecided."""
    for slowdown in SLOWDOWNS:
        found = verdicts(rng, count, Slower(1 + slowdown, 1 + slowdown), repetitions)
        outcomes: tuple[Outcome, ...] = ("passed", "failed", "undecided")
        shares = (share_of_subjects(found, outcome).value for outcome in outcomes)
        yield (str(count), percent(slowdown), *map(percent, shares))


def loads_of(
    rng: np.random.Generator, effect: float, ratio: float = 1.0, loads: int = LOADS
) -> list[NDArray[np.float64]]:
    """Run times of an engine, one array for each of its loads."""
    own = rng.normal(0, effect, (loads, 1))
    noise = rng.normal(0, _RUN_NOISE, (loads, _RUNS_OF_A_LOAD))
    return list(ratio * np.exp(own + noise))


def surely_faster(
    rng: np.random.Generator, effect: float, ratio: float, repetitions: int
) -> Interval:
    """How often one of three candidates of this true ratio is surely faster than fp32."""
    hits = []
    for _ in range(repetitions):
        fp32 = loads_of(rng, effect)
        candidates = [loads_of(rng, effect, ratio) for _ in range(_CANDIDATES)]
        ratios = [estimate_paired_ratio(candidate, fp32) for candidate in candidates]
        hits.append(any(surely_below(ratios)))
    return estimate_share(np.array(hits)).interval


def main() -> int:
    args = options(__doc__).parse_args()
    repetitions = 100 if args.quick else 1000
    rng = np.random.default_rng(0)
    bars: list[Bar] = []
    cells: list[tuple[str, ...]] = [("processes", "slower by", "passed", "failed", "undecided")]
    for count in PROCESSES:
        say(f"{count} processes, {repetitions} pairs of profiles for each truth")
        bars += wrong(rng, count, repetitions)
        cells += decided(rng, count, repetitions)
    print(columns(cells, left=0))
    loads: list[tuple[str, ...]] = [
        ("loads differ by", *(f"{share:.0%} faster" for share in (0.0, 0.05, 0.1)))
    ]
    for effect in LOAD_EFFECTS:
        equal, *others = (
            surely_faster(rng, effect, ratio, 4 * repetitions) for ratio in (1.0, 0.95, 0.9)
        )
        loads.append((percent(effect), *(percent(item.value) for item in (equal, *others))))
        name = f"surely_faster_among_equals_loads_{effect:.0%}".replace("%", "_percent")
        bars.append(held(name, equal, SURELY, 4 * repetitions))
    print(f"\nsurely faster than fp32\n{columns(loads, left=0)}")
    return finish(bars, args.out, decided=cells, surely=loads, repetitions=repetitions)


if __name__ == "__main__":
    sys.exit(main())
