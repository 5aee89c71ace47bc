"""What a device's answers come to while its server fails in every way.

A real server process serves the built-in bundle behind a proxy that can misbehave; the device
sends pictures to it with a deadline, and falls back to the same bundle. Shown are, for each
fault, the share of calls that were answered in time, the slowest one, and when all was well
again; what an open breaker adds to the device's own time; and what the calls of an hour with faults
in it come to (see `_faults_hour.py`: between the faults they follow each other at once).
"""

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from _bars import EMOJI_BUNDLE, Bar, finish, options
from _faults_cases import DEADLINE_MS, GRACE_MS, Bench, Case, run_case
from _faults_hour import Hour, run_hour
from _faults_overhead import Overhead, measure_overhead
from _faults_proxy import FaultyProxy
from _faults_server import NAME, ServerProcess, bundle_of_another_space

from edgeclip.compress.data.emoji_scenes import EmojiScenes
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.split_runtime import SplitRuntime

SLOW_S = 2 * DEADLINE_MS / 1e3
PER_SECOND = 4.0
FULL_SHARE = 0.992


def main() -> int:
    """Run everything; 1 if a bar was missed."""
    parser = options(__doc__ or "")
    parser.add_argument(
        "--bundle", type=Path, default=EMOJI_BUNDLE, help="(default: the built-in one)"
    )
    args = parser.parse_args()
    encoder = Encoder.open(args.bundle)
    overhead = measure_overhead(encoder, plan_for(encoder), 300 if args.quick else 3000)
    with made_bench(encoder) as bench:
        cases = [
            run_case(bench, name, fault, lasts_s=1.0 if args.quick else 3.0, after_s=2.5)
            for name, fault in bench.faults().items()
        ]
        part = 4 if args.quick else 1  # of the time and of the faults, so that all else is alike
        some = dict(list(bench.faults().items())[::part])
        hour = run_hour(bench, some, seconds=3600 / part, faulty_s=20 / part, per_second=PER_SECOND)
    show(cases, overhead, hour)
    return finish(
        [*case_bars(cases), *other_bars(overhead, hour)],
        args.out,
        cases=[asdict(case) for case in cases],
        overhead=asdict(overhead),
        hour=asdict(hour),
    )


def plan_for(encoder: Encoder) -> SplitPlan:
    """The picture goes to the server."""
    return SplitPlan(
        name="picture to the server",
        kind="image",
        space=encoder.space,
        model=f"{NAME}-image",
        codec="file",
        deadline_ms=DEADLINE_MS,
    )


@contextmanager
def made_bench(encoder: Encoder) -> Iterator[Bench]:
    """Start two servers, the second of another embedding space, and a proxy before the first."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = encoder.bundle.path
        first, other = ServerProcess(path), ServerProcess(bundle_of_another_space(path, folder))
        stack.callback(first.kill)
        stack.callback(other.kill)
        proxy = stack.enter_context(closing(FaultyProxy(first.port, SLOW_S)))
        server = stack.enter_context(Server(f"http://127.0.0.1:{proxy.port}"))
        runtime = SplitRuntime(encoder, plan_for(encoder), server)
        bench = Bench(runtime, proxy, first, other, picture())
        bench.calls(1.0, 50)
        yield bench


def picture() -> bytes:
    """A scene as a camera would store it."""
    written = io.BytesIO()
    EmojiScenes.render(EmojiScenes("test").scene(0), 320).save(written, "JPEG", quality=90)
    return written.getvalue()


def show(cases: Sequence[Case], overhead: Overhead, hour: Hour) -> None:
    """Print what was found."""
    print(f"deadline {DEADLINE_MS:g} ms; 20 calls per second into each fault and out of it again")
    print(
        f"{'fault':<24}{'calls':>6}{'in time':>9}{'worst':>9}{'again':>8}{'CPU denied':>12}  "
        "degraded because"
    )
    for case in cases:
        print(
            f"{case.name:<24}{case.calls:>6}{case.in_time:>9.2%}{case.worst_ms:>+6.1f} ms"
            f"{case.recovery_s:>6.2f} s{share(case.denied):>12}  {', '.join(case.reasons) or '-'}"
        )
    paired = overhead.paired
    print(
        f"\nopen breaker, {overhead.runs} pairs: {paired.value:+.3f} ms ({paired.low:+.3f} to "
        f"{paired.high:+.3f}) on the device's own time; alone, 99 of 100 calls take at most "
        f"{overhead.alone.value:.3f} ms"
    )
    print(
        f"the {hour.calls} calls of {hour.seconds / 60:.0f} minutes, {hour.faults} faults of "
        f"{hour.faulty_s:.1f} s together: {hour.answered:.3%} in time, {hour.full:.3%} at full "
        f"quality, slowest {hour.worst_ms:+.1f} ms after the deadline; CPU denied: "
        f"{share(hour.denied)}"
    )


def share(value: float | None) -> str:
    """As a percentage; a few are usual, more than ten make a machine a poor witness."""
    return "unavailable" if value is None else f"{value:.0%}"


def case_bars(cases: Sequence[Case]) -> Iterator[Bar]:
    """Three bars for each fault."""
    for case in cases:
        in_time = Bar(
            name=f"{case.name}: answered by the deadline + {GRACE_MS:g} ms",
            value=case.in_time,
            direction=">=",
            bound=1.0,
        )
        worst = Bar(
            name=f"{case.name}: slowest answer after the deadline",
            value=case.worst_ms,
            direction="<=",
            bound=GRACE_MS,
            unit="ms",
        )
        again = Bar(
            name=f"{case.name}: full service again",
            value=case.recovery_s,
            direction="<=",
            bound=2.0,
            unit="s",
        )
        yield from (in_time, worst, again)


def other_bars(overhead: Overhead, hour: Hour) -> Iterator[Bar]:
    """What an open breaker costs, and what an hour comes to."""
    for name, interval in (("paired", overhead.paired), ("alone, p99", overhead.alone)):
        yield Bar(
            name=f"open breaker on top of the device's own time, {name}",
            value=interval.value,
            direction="<=",
            bound=1.0,
            unit="ms",
            interval=interval,
        )
    yield Bar(name="hour: answered in time", value=hour.answered, direction=">=", bound=1.0)
    yield Bar(name="hour: at full quality", value=hour.full, direction=">=", bound=FULL_SHARE)


if __name__ == "__main__":
    sys.exit(main())
