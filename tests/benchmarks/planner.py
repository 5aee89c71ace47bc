"""What the planner predicts against what is measured, over links from 0.5 to 100 Mbit/s.

The built-in bundle is cut and timed; a device (this machine, acting 20 times slower) and a
server (a process of its own) stand in two network namespaces with a shaped link between them,
see `_network.py`. At every bandwidth the plans take turns; a latency counts from the moment
that its request was scheduled for. Two things are held against bars:

- regret: how much longer the plan that was chosen beforehand took than the one that turned out
  best, at the 95th percentile;
- error: how far each predicted 95th percentile is from the measured one. For that, a plan's
  stages and the round trip are sampled again right before each of its requests: a shared
  machine changes its speed from second to second, and so it does for both alike.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, command, options
from _network import Network, NetworkUnavailableError, Shape, shaped_network
from _planner_device import ONE_THREAD, TIMES_SLOWER, Device, slower
from _planner_samples import (
    LARGE,
    PAUSE_S,
    RTT_MS,
    SMALL,
    PlanSamples,
    Probe,
    all_works,
)

from edgeclip.export.cuts.write_cuts import write_cuts
from edgeclip.profiles.cuts.measure_cuts import TimedStage, measure_cuts
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import device_yaml
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.planning.choose_plan import Objective, PlanChoice, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate
from edgeclip.runtime.planning.plan import list_candidates
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.split.http_client import ClientRules, Server

BANDWIDTHS = (0.5, 2.0, 8.0, 30.0, 100.0)
ERROR_BAR, REGRET_BAR = 0.10, 0.05
_TURNS = 2  # of a plan that sends nothing, in a round: its tail is the machine's alone
_ROOT = Path(__file__).parents[2]  # where the server finds tests/echo_function.py
_CUTS = 3  # inside the tower, the soonest by prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan over one link: predicted and measured, in milliseconds."""

    mbps: float
    plan: str
    predicted_p50: float
    predicted_p95: float
    measured_p50: float
    measured_p95: Interval
    chosen: bool

    @property
    def error(self) -> float:
        """Relative error of the predicted 95th percentile."""
        return self.predicted_p95 / self.measured_p95.value - 1


@contextlib.contextmanager
def serving(network: Network, cuts: CutSet) -> Iterator[str]:
    """Run `edgeclip serve` on its side of the link, and give its address."""
    profile = cuts.path.with_name("one-thread.yaml")
    profile.write_text(device_yaml(ONE_THREAD), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "edgeclip.runtime.cli.main",
        "serve",
        str(EMOJI_BUNDLE),
        "--function",
        "tests.echo_function:echo",
    ]
    words += ["--cuts", str(cuts.path), "--device", str(profile), "--insecure"]
    words += ["--host", network.server_address, "--port", "0"]
    process = subprocess.Popen(
        network.command("server", words), cwd=_ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().rpartition(" at ")[2].strip()
    finally:
        process.terminate()
        process.wait()


def worth_measuring(choice: PlanChoice) -> list[PlanEstimate]:
    """The device alone, the picture and the pixels in each codec, and the best cuts inside."""
    inside = [item for item in choice.best_of_each() if item.plan.kind == "cut" and item.plan.cut]
    others = [item for item in choice.allowed if not item.plan.cut]
    return [*others, *inside[:_CUTS]]


def take_turns(
    device: Device, plans: Sequence[PlanSamples], probe: Probe, rounds: int
) -> dict[str, list[float]]:
    """Latencies of all plans in milliseconds, from when each request was scheduled."""
    found: dict[str, list[float]] = {item.candidate.plan.name: [] for item in plans}
    for number in range(rounds):
        probe.send(LARGE)
        for place in range(len(plans)):
            item = plans[(place + number) % len(plans)]
            plan, times = item.candidate.plan, found[item.candidate.plan.name]
            for _ in range(_TURNS if plan.kind == "device" else 1):
                time.sleep(PAUSE_S)  # before the samples as before the request: both are alike
                at = item.run_round()
                if plan.kind != "device":
                    probe.send(SMALL)
                due = time.perf_counter() + PAUSE_S
                time.sleep(PAUSE_S)
                device.embed(plan, at)
                times.append(1e3 * (time.perf_counter() - due))
    return found


def measure_link(
    mbps: float,
    device: Device,
    works: Mapping[SplitStage, TimedStage],
    times: tuple[StageTimes, StageTimes],
    rounds: int,
) -> list[Row]:
    """Choose beforehand, measure, and predict what was measured."""
    manifest = device.cuts.manifest
    probe = Probe(device, mbps)
    for size in (SMALL,) * 8 + (LARGE,) * 4:
        probe.send(size)
    conditions = PlanConditions(link=probe.state(), dim=manifest.dim)
    choice = choose_plan(estimate_plans(manifest, *times, conditions), Objective())
    wanted = {item.plan.name for item in worth_measuring(choice)}
    count = len(device.pictures)
    plans = [
        PlanSamples(item, works, count)
        for item in list_candidates(manifest, times[0])
        if item.plan.name in wanted
    ]
    latencies = take_turns(device, plans, probe, rounds)
    conditions = PlanConditions(link=probe.state(), dim=manifest.dim)
    rows = []
    for item in plans:
        values = np.array(latencies[item.candidate.plan.name])
        predicted = item.predict(times[0], len(values), conditions)
        rows.append(
            Row(
                mbps=mbps,
                plan=predicted.plan.name,
                predicted_p50=_known(predicted.plan.p50_ms),
                predicted_p95=predicted.p95_ms,
                measured_p50=float(np.median(values)),
                measured_p95=percentile_interval(values, 95),
                chosen=predicted.plan.name == choice.best.plan.name,
            )
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """The plans over one link, the soonest first."""
    print(f"\n{rows[0].mbps:g} Mbit/s, round trip {RTT_MS:g} ms")
    print(f"  {'plan':<34}{'p50':>8}{'predicted':>10}{'p95':>8}{'predicted':>10}{'error':>8}")
    for row in sorted(rows, key=lambda row: row.measured_p95.value):
        print(
            f"{'>' if row.chosen else ' '} {row.plan:<34}{row.measured_p50:>8.1f}"
            f"{row.predicted_p50:>10.1f}{row.measured_p95.value:>8.1f}{row.predicted_p95:>10.1f}"
            f"{100 * row.error:>7.1f}%",
            flush=True,
        )


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """The largest error and the regret at one bandwidth."""
    worst = max(rows, key=lambda row: abs(row.error))
    (chosen,) = (row for row in rows if row.chosen)
    best = min(row.measured_p95.value for row in rows)
    name = f"{rows[0].mbps:g}_mbps"
    return [
        Bar(
            name=f"largest_p95_error_at_{name}",
            value=abs(worst.error),
            direction="<=",
            bound=ERROR_BAR,
        ),
        Bar(
            name=f"regret_at_{name}",
            value=chosen.measured_p95.value / best - 1,
            direction="<=",
            bound=REGRET_BAR,
        ),
    ]


def run(folder: Path, bandwidths: Sequence[float], rounds: int) -> tuple[list[Row], list[Bar]]:
    """Cut, time, and measure over every link."""
    cuts = write_cuts(Bundle.open(EMOJI_BUNDLE), folder / "cuts", device=ONE_THREAD).cuts
    shape = Shape(up_mbps=bandwidths[0], down_mbps=bandwidths[0], rtt_ms=RTT_MS)
    rows, bars = list[Row](), list[Bar]()
    with shaped_network(shape) as network, serving(network, cuts) as address:
        print(f"timing each stage, on the device {TIMES_SLOWER} times over", flush=True)
        times = (
            measure_cuts(
                cuts, device=ONE_THREAD, command=command(), rounds=32, replace_stage=slower
            ),
            measure_cuts(cuts, device=ONE_THREAD, command=command(), rounds=200),
        )
        with network.entered("device"), Server(address, rules=ClientRules(hedges=False)) as server:
            device, works = Device.of(cuts, server), all_works(cuts)
            for mbps in bandwidths:
                network.shape(Shape(up_mbps=mbps, down_mbps=mbps, rtt_ms=RTT_MS))
                found = measure_link(mbps, device, works, times, rounds)
                print_rows(found)
                rows += found
                bars += bars_of(found)
    return rows, bars


def _known(value: float | None) -> float:
    assert value is not None
    return value


def merged(out: Path, rows: Sequence[Row], bars: Sequence[Bar]) -> dict[str, Any]:
    """The record in `out` with these links put in place of what it has of them.

    What another machine measured is dropped: the record names one machine.
    """
    machine = asdict(detect_machine())
    links = {row.mbps for row in rows}
    kept: dict[str, Any] = {"rows": [], "bars": []}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
        same = all(found["machine"][name] == machine[name] for name in ("cpu", "cores"))
        kept = found if same else kept
    ends = tuple(f"_at_{mbps:g}_mbps" for mbps in links)
    new_rows = [
        asdict(row) | {"error": row.error, "measured": time.strftime("%FT%TZ", time.gmtime())}
        for row in rows
    ]
    new_bars = [asdict(bar) | {"passed": bar.passed} for bar in bars]
    old_rows = [row for row in kept["rows"] if row["mbps"] not in links]
    old_bars = [bar for bar in kept["bars"] if not bar["name"].endswith(ends)]
    return {
        "command": command(),
        "machine": machine,
        "rows": sorted(old_rows + new_rows, key=lambda row: row["mbps"]),
        "bars": old_bars + new_bars,
    }


def main() -> int:
    """Measure, print tables, write the figures."""
    parser = options(__doc__ or "")
    parser.add_argument(
        "--mbps",
        type=float,
        nargs="+",
        help="measure these bandwidths alone; what --out holds of others stays",
    )
    args = parser.parse_args()
    bandwidths = args.mbps or (BANDWIDTHS[1::2] if args.quick else BANDWIDTHS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, bars = run(Path(folder), bandwidths, 30 if args.quick else 64)
    except NetworkUnavailableError as error:
        print(f"not measured: {error}")
        return 2
    if args.out is not None:
        record = merged(args.out, rows, bars)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n" + "\n".join(bar.line() for bar in bars))
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
