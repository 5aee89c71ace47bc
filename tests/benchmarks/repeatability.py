"""Two profiles of one bundle agree, and a planted slowdown is found where there is one.

Each profile is what `edgeclip profile` does: fresh processes, one after the other, in which the
subjects and the yardstick take turns. Every two profiles in succession are a pair. In each the
subject has a double that spins for a tenth of its own time after each run. Set against the plain
subject of the profile before, the double is a change that costs 10%, and the plain subject is one
that costs nothing; the gate judges both, with a slowdown of 5% tolerated.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from math import exp, sqrt
from typing import Literal

from _bars import Bar, finish, options
from _repeatability_case import Pair, Profile, joined, paired, profile, workload
from _slowed_process import slow_down

from edgeclip.profiles.compare.compare_runs import Comparison, RatioEstimate
from edgeclip.profiles.compare.regression_gate import GateOutcome, regression_gate
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.quality.intervals import Interval

_PLANTED, _TOLERATED = 0.10, 0.05
_NORMAL = 1.96
_HEAD = (
    "pair  baseline ms    now ms     times  to yardstick   fastest   planted  judged       judged"
)


def main() -> int:
    """Measure all profiles, then look at each pair."""
    parser = options(__doc__ or "")
    parser.add_argument("--pairs", type=int, help="default: 40, or 2 with --quick")
    gate = load_workload("ci")
    for name, default in {
        "processes": gate.processes,
        "repeats": gate.repeats,
        "seconds": gate.turn_seconds,
    }.items():
        words = f"of each profile (default: {default}, as in the workload ci)"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=words)
    parser.add_argument("--precision", choices=("fp32", "int8"), default="int8")
    args = parser.parse_args()
    slow_down(_PLANTED)
    amount = workload(args.processes, args.repeats, args.seconds)
    profiles, count = [], 2 * (args.pairs or (2 if args.quick else 40))
    for number in range(count):
        profiles.append(profile(args.precision, amount))
        print(f"profile {number + 1} of {count}", file=sys.stderr, flush=True)
    pairs = paired(profiles)
    _print_pairs(pairs)
    _print_errors(pairs)
    _print_shares(profiles, args.processes)
    return finish(_bars(pairs), args.out)


def _print_pairs(pairs: Sequence[Pair]) -> None:
    print(_HEAD)
    for number, pair in enumerate(pairs, 1):
        same, planted = pair.nothing, pair.planted
        print(
            f"{number:>4}{same.baseline_ms.value:>13.3f}{same.now_ms.value:>10.3f}"
            f"{same.times.value:>10.3f}{same.ratio.value:>14.3f}"
            f"{_fastest(same).value:>10.3f}{_fastest(planted).value:>10.3f}"
            f"  {_outcome(same):<9}  {_outcome(planted)}",
        )


def _fastest(item: Comparison) -> RatioEstimate:
    assert item.fastest is not None
    return item.fastest


def _print_errors(pairs: Sequence[Pair]) -> None:
    """What limits the gate: how far apart processes lie, with and without the yardstick."""
    views: dict[str, Callable[[Comparison], RatioEstimate]] = {
        "times": lambda item: item.times,
        "to the yardstick": lambda item: item.ratio,
        "fastest runs": _fastest,
    }
    print("\nstandard error of the ratio    median   largest   of it within processes")
    for name, view in views.items():
        ratios = sorted((view(pair.nothing) for pair in pairs), key=lambda item: item.error or 0)
        middle, last = ratios[len(ratios) // 2], ratios[-1]
        shares = [exp(item.error or 0) - 1 for item in (middle, last)]
        within = min(1.0, (middle.noise / (middle.error or 1)) ** 2)
        print(f"{name:<28}{shares[0]:>9.2%}{shares[1]:>10.2%}{within:>25.0%}")


def _print_shares(profiles: Sequence[Profile], processes: int) -> None:
    """What the gate would have seen with fewer and with more processes."""
    print("\nprocesses  pairs  agree  1 in the interval  planted found  nothing failed  undecided")
    by_count = {processes: list(profiles), 2 * processes: joined(profiles)}
    by_count[4 * processes] = joined(by_count[2 * processes])
    for count, several in by_count.items():
        pairs = paired(several)
        if not pairs:
            continue
        inside = [p.nothing.ratio.interval for p in pairs]
        print(
            f"{count:>9}{len(pairs):>7}{_share(pair.agrees for pair in pairs):>7.0%}"
            f"{_share(item.low <= 1 <= item.high for item in inside):>19.0%}"
            f"{_share(_outcome(p.planted) == 'regressed' for p in pairs):>15.0%}"
            f"{_share(_outcome(p.nothing) == 'regressed' for p in pairs):>16.0%}"
            f"{_share(_outcome(p.nothing) == 'undecided' for p in pairs):>11.0%}"
        )


def _bars(pairs: Sequence[Pair]) -> list[Bar]:
    found = [_outcome(pair.planted) == "regressed" for pair in pairs]
    failed = [_outcome(pair.nothing) == "regressed" for pair in pairs]
    return [
        _bar("repeatability_profiles_agree", [pair.agrees for pair in pairs], ">=", 0.95),
        _bar("repeatability_planted_found", found, ">=", 0.95),
        _bar("repeatability_nothing_failed", failed, "<=", 0.05),
    ]


def _bar(name: str, hits: Sequence[bool], direction: Literal[">=", "<="], bound: float) -> Bar:
    share = _share(hits)
    return Bar(name=name, value=share, direction=direction, bound=bound, interval=_wilson(hits))


def _outcome(comparison: Comparison) -> GateOutcome:
    return regression_gate([comparison], _TOLERATED).outcome


def _share(hits: Iterable[bool]) -> float:
    several = list(hits)
    return sum(several) / len(several)


def _wilson(hits: Sequence[bool]) -> Interval:
    """The 95% interval of a share (Wilson, 1927)."""
    count, share = len(hits), _share(hits)
    wide = _NORMAL**2 / count
    middle = (share + wide / 2) / (1 + wide)
    half = sqrt(wide * share * (1 - share) + wide**2 / 4) / (1 + wide)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


if __name__ == "__main__":
    sys.exit(main())
