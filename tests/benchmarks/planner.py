"""What the planner predicts against what is measured, over links from 0.5 to 100 Mbit/s.

The built-in bundle is cut and timed; a device (this machine, doing each of its stages 20 times
over, since equally fast ends would never send anything) and a server (a process of its own)
stand in two network namespaces with a shaped link between them, see `_network.py`. At every
bandwidth the plans take turns; a latency counts from when its request was scheduled.

Regret is how much longer the plan that was chosen beforehand took than the one that turned out
best, at the 95th percentile; error is how far each predicted 95th percentile is from the measured
one. For that, a plan's stages and the round trip are sampled again right before each of its
requests: a shared machine changes its speed from second to second, for both alike.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, at_most, command, finish, options
from _network import ADDRESSES, EFFICIENCY, Shape, shaped_network
from _processes import SERVE, ServerProcess, UnavailableError

from edgeclip.export.cuts.write_cuts import write_cuts
from edgeclip.profiles.cuts.measure_cuts import StageBuilder, StageSampler, TimedStage, measure_cuts
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import device_yaml, load_device
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.planning.choose_plan import Objective, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutHead, CutSet
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate, estimate_plan
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.plan import PlanCandidate, SplitPlan, list_candidates
from edgeclip.runtime.planning.replanning import LinkEstimator
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.wire.codec import codec_name, encode, encode_picture
from edgeclip.runtime.wire.messages import BUNDLE, CODEC, CUT, SPACE_ID, InferRequest

T = TypeVar("T")

BANDWIDTHS = (0.5, 2.0, 8.0, 30.0, 100.0)
ERROR_BAR, REGRET_BAR = 0.10, 0.05
RTT_MS = 20.0
ONE_THREAD = replace(load_device("this-machine"), threads=1)
TIMES_SLOWER = 20
_TURNS = 2  # of a plan that sends nothing, in a round: its tail is the machine's alone
_CUTS = 3  # inside the tower, the soonest by prediction
_PAUSE_S = 0.25  # between requests: longer than TCP's timeout, so that slow start begins anew
_SMALL, _LARGE = 100, 12_000  # bytes of a probe
_ECHO_JSON, _ECHO_REPLY = 256, 192  # bytes of a probe's JSON, and of its reply
_DEADLINE_MS = 60_000.0


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
        return self.predicted_p95 / self.measured_p95.value - 1


def slowly(run: Callable[[], T]) -> T:
    """Do something as often as the device is slower."""
    for _ in range(TIMES_SLOWER - 1):
        run()
    return run()


def slower(work: TimedStage) -> TimedStage:
    """A stage as the device would need for it."""
    return TimedStage(work.stage, lambda at: slowly(lambda: work.run(at)))


class Device:
    """Runs plans for a cut tower, and asks a server where they say so."""

    def __init__(self, cuts: CutSet, server: Server) -> None:
        self.cuts, self._server = cuts, server
        self._whole = CutTail(cuts, 0, ONE_THREAD)
        self._heads = {number: CutHead(cuts, number, ONE_THREAD) for number in cuts.numbers}
        self.pictures = tuple(Path(path).read_bytes() for path in cuts.pictures)

    def embed(self, plan: SplitPlan, at: int) -> object:
        """Embed picture `at` as a plan says; float32 [1, dim]."""
        picture, spec = self.pictures[at % len(self.pictures)], self.cuts.manifest.image
        if plan.kind == "image":
            sent = slowly(lambda: encode_picture(str(plan.codec), picture, spec))
            return self._ask(plan, {"images": np.array([sent], dtype=object)}, {})
        pixels = slowly(lambda: resize_and_crop(picture, spec))[None]
        if plan.kind == "device":
            return slowly(lambda: self._whole.embed(pixels))
        head, codec = self._heads[plan.cut or 0], codec_name(plan.codec)
        values = slowly(lambda: head.run(pixels)) if plan.cut else pixels
        tensors = slowly(lambda: encode(codec, values, axis=head.point.axis))
        return self._ask(plan, tensors, {CODEC: codec, CUT: str(plan.cut)})

    def _ask(self, plan: SplitPlan, inputs: dict[str, Any], more: dict[str, str]) -> object:
        manifest = self.cuts.manifest
        parameters = {SPACE_ID: manifest.space, BUNDLE: manifest.bundle, **more}
        request = InferRequest(model=str(plan.model), inputs=inputs, parameters=parameters)
        response = self._server.infer(request, Deadline.after_ms(_DEADLINE_MS))
        return response.outputs["image_embeds"]

    def echo(self, size: int) -> float:
        """Milliseconds of a request that the server does nothing about."""
        request = InferRequest(model="echo", inputs={"data": np.zeros((1, size), np.uint8)})
        began = time.perf_counter()
        self._server.infer(request, Deadline.after_ms(_DEADLINE_MS))
        return 1e3 * (time.perf_counter() - began)


class Probe:
    """What requests that compute nothing tell of the link."""

    def __init__(self, device: Device, mbps: float) -> None:
        self._device = device
        about: dict[str, Any] = {"rtt_ms": (RTT_MS,), "up_mbps": (mbps,), "down_mbps": (mbps,)}
        assumed = LinkState(name=f"{mbps:g} Mbit/s", efficiency=EFFICIENCY, **about)
        self._estimator = LinkEstimator(assumed, max_age_s=3600)
        device.echo(_SMALL)  # makes the connection

    def send(self, size: int) -> None:
        """Send one request of that many bytes, after a pause that lets TCP begin anew."""
        time.sleep(_PAUSE_S if size > _SMALL else 0.0)
        took = self._device.echo(size)
        self._estimator.observe(sent=size + _ECHO_JSON, received=_ECHO_REPLY, network_ms=took)

    def conditions(self) -> PlanConditions:
        link = self._estimator.state()
        return PlanConditions(link=link, dim=self._device.cuts.manifest.dim)


class PlanSamples:
    """The stages of one plan, on both sides, each time that a request for it is due."""

    def __init__(
        self, candidate: PlanCandidate, works: Mapping[SplitStage, TimedStage], count: int
    ) -> None:
        self.candidate = candidate
        here = [slower(works[stage]) for stage in (*candidate.device, *candidate.encode)]
        there = [works[stage] for stage in (*candidate.decode, *candidate.server)]
        there = there or here  # the device alone asks no server
        self.sides = (StageSampler(here, count), StageSampler(there, count))
        self.latencies: list[float] = []  # ms
        for side in self.sides:
            side.warm_up()

    def predict(self, known: StageTimes, conditions: PlanConditions) -> PlanEstimate:
        """What the planner makes of them; `known` says all but the stages."""
        rounds, payload = len(self.latencies), self.candidate.payload
        about = replace(known, rounds=rounds, pictures=min(rounds, known.pictures), payloads=())
        here, there = (replace(about, stages=tuple(side.samples())) for side in self.sides)
        if payload is not None:
            payload = replace(
                payload, bytes=payload.bytes[:rounds], cosines=payload.cosines[:rounds]
            )
        return estimate_plan(replace(self.candidate, payload=payload), here, there, conditions)


def take_turns(device: Device, plans: Sequence[PlanSamples], probe: Probe, rounds: int) -> None:
    """Run all plans in turns; a latency counts from when its request was scheduled."""
    for number in range(rounds):
        probe.send(_LARGE)
        for place in range(len(plans)):
            item = plans[(place + number) % len(plans)]
            plan = item.candidate.plan
            for _ in range(_TURNS if plan.kind == "device" else 1):
                time.sleep(_PAUSE_S)  # before the samples as before the request: both are alike
                for side in item.sides:
                    side.run_round()
                if plan.kind != "device":
                    probe.send(_SMALL)
                due = time.perf_counter() + _PAUSE_S
                time.sleep(_PAUSE_S)
                device.embed(plan, len(item.latencies))
                item.latencies.append(1e3 * (time.perf_counter() - due))


def measure_link(
    mbps: float,
    device: Device,
    works: Mapping[SplitStage, TimedStage],
    times: tuple[StageTimes, StageTimes],
    rounds: int,
) -> Iterator[Row]:
    """Choose beforehand, measure, and predict what was measured."""
    manifest, probe = device.cuts.manifest, Probe(device, mbps)
    for size in (_SMALL,) * 8 + (_LARGE,) * 4:
        probe.send(size)
    choice = choose_plan(estimate_plans(manifest, *times, probe.conditions()), Objective())
    # The device alone, the picture and the pixels in each codec, and the best cuts inside.
    inside = [item for item in choice.best_of_each() if item.plan.kind == "cut" and item.plan.cut]
    others = [item for item in choice.allowed if not item.plan.cut]
    wanted = {item.plan.name for item in (*others, *inside[:_CUTS])}
    plans = [
        PlanSamples(item, works, len(device.pictures))
        for item in list_candidates(manifest, times[0])
        if item.plan.name in wanted
    ]
    take_turns(device, plans, probe, rounds)
    conditions = probe.conditions()
    for item in plans:
        predicted, values = item.predict(times[0], conditions), np.array(item.latencies)
        assert predicted.plan.p50_ms is not None
        yield Row(
            mbps=mbps,
            plan=predicted.plan.name,
            predicted_p50=predicted.plan.p50_ms,
            predicted_p95=predicted.p95_ms,
            measured_p50=float(np.median(values)),
            measured_p95=percentile_interval(values, 95),
            chosen=predicted.plan.name == choice.best.plan.name,
        )


def table(rows: Sequence[Row]) -> str:
    """The plans over one link, the soonest first."""
    cells: list[tuple[str, ...]] = [("", "plan", "p50", "predicted", "p95", "predicted", "error")]
    for row in sorted(rows, key=lambda row: row.measured_p95.value):
        p95 = row.measured_p95.value
        times = (row.measured_p50, row.predicted_p50, p95, row.predicted_p95)
        mark = ">" if row.chosen else ""
        cells.append((mark, row.plan, *(f"{ms:.1f}" for ms in times), f"{row.error:+.1%}"))
    return f"\n{rows[0].mbps:g} Mbit/s, round trip {RTT_MS:g} ms\n{columns(cells, left=2)}"


def bars_of(rows: Sequence[Row]) -> Iterator[Bar]:
    (chosen,) = (row for row in rows if row.chosen)
    best, name = min(row.measured_p95.value for row in rows), f"{rows[0].mbps:g}_mbps"
    worst = max(abs(row.error) for row in rows)
    yield at_most(f"largest_p95_error_at_{name}", worst, ERROR_BAR)
    yield at_most(f"regret_at_{name}", chosen.measured_p95.value / best - 1, REGRET_BAR)


def run(folder: Path, bandwidths: Sequence[float], rounds: int) -> Iterator[list[Row]]:
    cuts = write_cuts(Bundle.open(EMOJI_BUNDLE), folder / "cuts", device=ONE_THREAD).cuts
    profile = folder / "one-thread.yaml"
    profile.write_text(device_yaml(ONE_THREAD), encoding="utf-8")
    serve = [*SERVE, str(EMOJI_BUNDLE), "--function", "tests.echo_function:echo", "--insecure"]
    serve += ("--cuts", str(cuts.path), "--device", str(profile), "--host", ADDRESSES["server"])
    shape = Shape(up_mbps=bandwidths[0], down_mbps=bandwidths[0], rtt_ms=RTT_MS)
    with (
        shaped_network(shape) as network,
        ServerProcess(network.command("server", serve)) as process,
        network.entered("device"),
        Server(process.url, rules=ClientRules(hedges=False)) as server,
    ):
        print(f"timing each stage, on the device {TIMES_SLOWER} times over", flush=True)
        about: dict[str, Any] = {"device": ONE_THREAD, "command": command()}
        here = measure_cuts(cuts, rounds=32, replace_stage=slower, **about)
        times = (here, measure_cuts(cuts, rounds=200, **about))
        device, builder = Device(cuts, server), StageBuilder(cuts, ONE_THREAD, cuts.pictures)
        stages = list(builder.picture_stages())
        for point in cuts.manifest.points:
            stages += builder.cut_stages(point)[0]
        works = {work.stage: work for work in stages}
        for mbps in bandwidths:
            network.shape(Shape(up_mbps=mbps, down_mbps=mbps, rtt_ms=RTT_MS))
            yield [*measure_link(mbps, device, works, times, rounds)]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--mbps", type=float, nargs="+", help="measure these bandwidths alone")
    args = parser.parse_args()
    bandwidths = args.mbps or (BANDWIDTHS[1::2] if args.quick else BANDWIDTHS)
    rows, bars = list[Row](), list[Bar]()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for found in run(Path(folder), bandwidths, 30 if args.quick else 64):
                print(table(found), flush=True)
                rows += found
                bars += bars_of(found)
    except UnavailableError as error:
        print(f"not measured: {error}")
        return 2
    told = [asdict(row) | {"error": row.error} for row in rows]
    return finish(bars, args.out, rows=told)


if __name__ == "__main__":
    sys.exit(main())
