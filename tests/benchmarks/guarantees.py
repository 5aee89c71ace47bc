"""Does every promise hold as often as it says? Certificates, the watch, gates, the regression gate.

Everything is simulated where the truth is known, with the product's own functions: students that
keep exactly what is promised, or a little less, so that each certificate would be wrong; losses
that are exactly the bound; streams without drift; programs that are as slow as is tolerated. Bars
are the stated levels with three standard errors of the simulation on top. Power is printed beside
them: what a promise costs in what it cannot see. `regression_power.py` has the regression gate's
cases in full.
"""

import math
import sys
from collections.abc import Callable, Iterator

from _bars import Bar, Rule, finish, hold, options, say
from regression_power import gate_errors

from edgeclip.runtime.console import columns
from tests.export.cascade.simulate_certificates import (
    false_alarms,
    wrong_certificates,
    wrong_of_several,
    wrong_when_raised,
)
from tests.export.gates.simulate_gates import (
    burst_passes,
    clustered_passes,
    mean_cosine_passes,
    outcome_shares,
    passes_after_raising,
    passes_in_looks,
)

LEVEL = 0.05
BARS: dict[str, Rule] = {"*": ("<=", None, "of the repetitions")}  # `most_wrong`
BOUND = 0.01  # loss of R@1 that the gates tolerate

Wrong = Callable[[int], float]

CERTIFICATES: dict[str, Wrong] = {
    "certificate": wrong_certificates,
    "certificate_ties": lambda times: wrong_certificates(times, tied=True),
    "certificate_60_queries": lambda times: wrong_certificates(times, count=60),
    "certificate_clusters_of_5": lambda times: wrong_certificates(times, cluster=5),
    "certificate_clusters_of_20": lambda times: wrong_certificates(times, cluster=20),
    "certificate_count_raised": wrong_when_raised,
    "certificate_10_students": wrong_of_several,
    "watch_30_starts": lambda times: false_alarms(times, alpha=LEVEL),
}
GATES: dict[str, Wrong] = {
    "gate_passed_100_pairs": lambda times: outcome_shares(100, BOUND, 0.05, times)["passed"],
    "gate_passed_1000_pairs": lambda times: outcome_shares(1000, BOUND, 0.01, times)["passed"],
    "gate_passed_3000_pairs": lambda times: outcome_shares(3000, BOUND, 0.02, times)["passed"],
    "gate_failed_1000_pairs": lambda times: outcome_shares(1000, BOUND, 0.05, times)["failed"],
    "gate_failed_3000_pairs": lambda times: outcome_shares(3000, BOUND, 0.05, times)["failed"],
    "gate_count_raised_4_looks_declared": lambda times: passes_after_raising(
        (500, 1000, 2000, 4000), BOUND, 0.02, times, declared=True
    ),
    "gate_3_candidates": lambda times: passes_in_looks(3000, BOUND, 0.02, times, 3),
    "gate_bursts_of_20": lambda times: burst_passes(1000, 0.05, 20, BOUND, 0.02, times),
    "gate_bursts_of_10": lambda times: burst_passes(1000, 0.1, 10, BOUND, 0.02, times),
    "gate_clusters_of_5": lambda times: clustered_passes(600, 5, BOUND, 0.02, times, declared=True),
}


def most_wrong(repetitions: int) -> float:
    """The level, and three standard errors: two dozen bars are held at once."""
    return LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / repetitions)


def errors(repetitions: int) -> Iterator[Bar]:
    bound = most_wrong(repetitions)
    for name, wrong in {**CERTIFICATES, **GATES}.items():
        say(f"{name} ...")
        yield hold(BARS, name, wrong(repetitions), bound)
    say("regression gate ...")
    for name, share in gate_errors(repetitions).items():
        yield hold(BARS, f"regression_gate_{name}", share, bound)


def broken_promises(repetitions: int) -> dict[str, float]:
    """How often promises are broken where what must be declared is not, and where t is too narrow.

    A mean of cosines of which few have collapsed is no sum that is nearly normal.
    """
    return {
        **{
            f"gate of the mean cosine, {count} pairs, 0.5% at cosine 0": mean_cosine_passes(
                count, 0.005, 0.0, repetitions
            )
            for count in (300, 1000, 3000)
        },
        "certificate, clusters of 20 not declared": wrong_certificates(
            repetitions, cluster=20, declared=False
        ),
        "gate, clusters of 5 not declared": clustered_passes(
            600, 5, BOUND, 0.02, repetitions, declared=False
        ),
        "gate, 4 counts not declared": passes_after_raising(
            (500, 1000, 2000, 4000), BOUND, 0.02, repetitions, declared=False
        ),
    }


def power(repetitions: int) -> list[dict[str, float]]:
    """Outcomes of gates by pairs, true loss and share of changed answers."""
    return [
        {"pairs": pairs, "loss": loss, "changed": changed}
        | outcome_shares(pairs, loss, changed, repetitions)
        for pairs in (100, 300, 1000, 3000)
        for loss, changed in ((0.0, 0.005), (0.0, 0.02), (0.02, 0.02))
    ]


def main() -> int:
    args = options(__doc__).parse_args()
    repetitions = 300 if args.quick else 1000
    bars = list(errors(repetitions))
    broken, decided = broken_promises(repetitions), power(repetitions)
    for name, share in broken.items():
        print(f"{name}: broken in {share:.1%}")
    names = ("pairs", "loss", "changed", "passed", "failed", "undecided")
    rows = [[f"{row[name]:g}" for name in names] for row in decided]
    print("\n".join(["", "a gate of one point:", columns([list(names), *rows], left=0), ""]))
    return finish(
        bars,
        args.out,
        repetitions=repetitions,
        level=LEVEL,
        broken=broken,
        power=decided,
    )


if __name__ == "__main__":
    sys.exit(main())
