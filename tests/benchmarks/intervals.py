"""Do 95% intervals cover the truth at 27, 100 and 1,000 items, and how wide are they?

Truths are known because the data are drawn here; the intervals are the product's own. Shares of
hits and misses are not simulated but enumerated: each count of hits with its binomial probability.
Beside each width stands that of the percentile bootstrap (Efron 1979) with 1,000 resamples on the
first of the same samples, and its coverage there.

The bar is the least coverage of each kind over its cases, 93% and no lower: what a 95% interval
loses to an approximation and to chance of the simulation.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from _bars import Rule, finish, hold, options, say

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.stats.interval import Estimate, Interval
from edgeclip.runtime.stats.percentiles import estimate_percentile
from edgeclip.runtime.stats.shares import (
    ShareEstimate,
    estimate_kept,
    estimate_loss,
    estimate_share,
)

COUNTS = (27, 100, 1000)
BARS: dict[str, Rule] = {"covered_*": (">=", 0.93, "")}
RESAMPLES = 1000
COMPARED = 100  # samples whose bootstrap interval is computed as well

Arrays = tuple[Values, ...]
Draw = Callable[[np.random.Generator, int], Arrays]
Statistic = Callable[[Arrays], Values]  # of values [resamples, items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A statistic of drawn items whose truth is known.

    Attributes:
        kind: the bar that it counts for.
        says: the population.
        truth: the true value.
        draw: draws the arrays of `count` items.
        estimate: the product's estimate from these arrays.
        statistic: the same of resamples, for the bootstrap.
    """

    kind: str
    says: str
    truth: float
    draw: Draw
    estimate: Callable[..., Estimate]
    statistic: Statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Coverage and median width of a case at one count; None for an infinite width."""

    kind: str
    says: str
    count: int
    coverage: float
    width: float | None
    bootstrap_coverage: float
    bootstrap_width: float


def both_directions(share: float) -> Draw:
    """R@1 of both directions: two hits of each picture, which agree more often than by chance."""

    def draw(rng: np.random.Generator, count: int) -> Arrays:
        first = rng.random(count)
        second = np.where(rng.random(count) < 0.5, first, rng.random(count))
        return (((first < share).astype(float) + (second < share)) / 2,)

    return draw


def paired(share: float, lost: float, gained: float) -> Draw:
    """Hits of a reference, and of a model that loses and gains some."""

    def draw(rng: np.random.Generator, count: int) -> Arrays:
        reference = rng.random(count) < share
        rate = np.where(reference, lost / share, gained / (1 - share))
        changed = rng.random(count) < rate
        return reference.astype(float), (reference ^ changed).astype(float)

    return draw


def cosines(rng: np.random.Generator, count: int) -> Arrays:
    """Cosines near 1 with a tail: 1 minus a log-normal loss, cut at -1."""
    return (np.maximum(-1.0, 1 - rng.lognormal(-5, 1, count)),)


def latencies(rng: np.random.Generator, count: int) -> Arrays:
    """Milliseconds with a heavy tail: one run in twenty takes several times as long."""
    slow = rng.random(count) < 0.05
    return (rng.lognormal(0, 0.1, count) * np.where(slow, rng.uniform(1.5, 4, count), 1.0),)


def true_percentile(draw: Draw, percent: float) -> float:
    """Percentile of a population, from 4 million draws: its error is far below any width."""
    (values,) = draw(np.random.default_rng(12345), 4_000_000)
    return float(np.percentile(values, percent))


def percentile_case(
    kind: str,
    says: str,
    draw: Draw,
    percent: float,
    least: float = -math.inf,
    most: float = math.inf,
) -> Case:
    def estimate(values: Values) -> Estimate:
        return estimate_percentile(values, percent, least=least, most=most)

    return Case(
        kind=kind,
        says=says,
        truth=true_percentile(draw, percent),
        draw=draw,
        estimate=estimate,
        statistic=lambda drawn: np.asarray(np.percentile(drawn[0], percent, axis=-1)),
    )


def cases() -> Iterator[Case]:
    for share in (0.9, 0.97, 0.99):
        yield Case(
            kind="both_directions",
            says=f"R@1 {share:.0%}",
            truth=share,
            draw=both_directions(share),
            estimate=estimate_share,
            statistic=lambda drawn: drawn[0].mean(axis=-1),
        )
    for share, lost, gained in (
        (0.95, 0.01, 0.01),
        (0.95, 0.03, 0.01),
        (0.99, 0.03, 0.0),
        (0.5, 0.1, 0.1),
    ):
        says = f"R@1 {share:.0%}, {lost:.0%} lost, {gained:.0%} gained"
        yield Case(
            kind="losses",
            says=says,
            truth=lost - gained,
            draw=paired(share, lost, gained),
            estimate=estimate_loss,
            statistic=lambda drawn: drawn[0].mean(axis=-1) - drawn[1].mean(axis=-1),
        )
        yield Case(
            kind="kept_ratios",
            says=says,
            truth=(share - lost + gained) / share,
            draw=paired(share, lost, gained),
            estimate=lambda reference, ours: estimate_kept(ours, reference),
            statistic=lambda drawn: drawn[1].mean(axis=-1) / drawn[0].mean(axis=-1),
        )
    yield percentile_case("p1_cosines", "log-normal losses", cosines, 1, least=-1.0, most=1.0)
    yield percentile_case("p50_latencies", "one run in 20 slow", latencies, 50)
    yield percentile_case("p99_latencies", "one run in 20 slow", latencies, 99)


def bootstrap(arrays: Arrays, statistic: Statistic, rng: np.random.Generator) -> Interval:
    """The percentile bootstrap's 95% interval, item by item."""
    items = rng.integers(0, len(arrays[0]), (RESAMPLES, len(arrays[0])))
    found = statistic(tuple(array[items] for array in arrays))
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(statistic(arrays)), float(low), float(high))


def simulate(case: Case, count: int, repetitions: int) -> Row:
    rng, resampling = np.random.default_rng(count), np.random.default_rng(1)
    found: list[Interval] = []
    rivals: list[Interval] = []
    for number in range(repetitions):
        arrays = case.draw(rng, count)
        found.append(case.estimate(*arrays).interval)
        if number < COMPARED:
            rivals.append(bootstrap(arrays, case.statistic, resampling))
    width = float(np.median([item.high - item.low for item in found]))
    return Row(
        kind=case.kind,
        says=case.says,
        count=count,
        coverage=covered(found, case.truth),
        width=width if math.isfinite(width) else None,
        bootstrap_coverage=covered(rivals, case.truth),
        bootstrap_width=float(np.median([item.high - item.low for item in rivals])),
    )


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([item.low <= truth <= item.high for item in intervals]))


def enumerate_shares(count: int) -> Iterator[Row]:
    """Coverage of shares of hits and misses, over all counts of hits."""
    intervals = [ShareEstimate(hits / count, count, None).interval for hits in range(count + 1)]
    rng = np.random.default_rng(0)
    for share in (0.5, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999):
        chances = binomial(count, share)
        inside = np.array([item.low <= share <= item.high for item in intervals])
        widths = np.array([item.high - item.low for item in intervals])
        rivals = [
            bootstrap(
                ((rng.random(count) < share).astype(float),),
                lambda drawn: drawn[0].mean(axis=-1),
                rng,
            )
            for _ in range(COMPARED)
        ]
        yield Row(
            kind="shares",
            says=f"{share:.1%}",
            count=count,
            coverage=float(chances[inside].sum()),
            width=float(chances @ widths),
            bootstrap_coverage=covered(rivals, share),
            bootstrap_width=float(np.mean([item.high - item.low for item in rivals])),
        )


def binomial(count: int, share: float) -> Values:
    """Probability of each count of hits: [count + 1]."""
    hits = np.arange(count + 1)
    logs = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
                     for k in hits])  # fmt: skip
    chances: Values = np.exp(logs + hits * math.log(share) + (count - hits) * math.log1p(-share))
    return chances


def table(rows: list[Row]) -> str:
    lines = [f"{'what':<16} {'population':<28} {'n':>5} {'covered':>8} {'width':>9} "
             f"{'bootstrap':>10} {'width':>9}"]  # fmt: skip
    for row in rows:
        width = "no bound" if row.width is None else f"{row.width:.4g}"
        lines.append(
            f"{row.kind:<16} {row.says:<28} {row.count:>5} {row.coverage:>8.1%} {width:>9} "
            f"{row.bootstrap_coverage:>10.0%} {row.bootstrap_width:>9.4g}"
        )
    return "\n".join(lines)


def main() -> int:
    args = options(__doc__).parse_args()
    repetitions = 1000 if args.quick else 4000
    rows = [row for count in COUNTS for row in enumerate_shares(count)]
    for case in cases():
        say(f"{case.kind}: {case.says} ...")
        rows += [simulate(case, count, repetitions) for count in COUNTS]
    print(table(rows))
    kinds = dict.fromkeys(row.kind for row in rows)
    least = {kind: min(row.coverage for row in rows if row.kind == kind) for kind in kinds}
    bars = [hold(BARS, f"covered_{kind}", value) for kind, value in least.items()]
    return finish(bars, args.out, repetitions=repetitions, rows=list(map(asdict, rows)))


if __name__ == "__main__":
    sys.exit(main())
