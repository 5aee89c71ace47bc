"""What the planner predicts against what is measured, over links from 0.5 to 100 Mbit/s.

The built-in bundle is cut and timed; a device (this machine, doing each of its stages 20 or 100
times over, since equally fast ends would never send anything) and a server (a process of its own)
stand in two network namespaces with a shaped link between them, see `_network.py`. In every case
the plans take turns; a latency counts from when its request was scheduled.

Regret is how much longer the plan that was chosen beforehand took than the one that turned out
best, at the 95th percentile; error is how far each predicted median and 95th percentile is from
the measured one. For that, a plan's stages and the round trip are sampled again right before each
of its requests: a shared machine changes its speed from second to second, for both alike. Whether
other programs disturbed a case is watched and written beside it.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, Rule, command, finish, hold, options, say, span
from _network import ADDRESSES, EFFICIENCY, Shape, shaped_network
from _processes import SERVE, ServerProcess, UnavailableError

from edgeclip.export.cuts.write_cuts import write_cuts
from edgeclip.profiles.cuts.measure_cuts import StageBuilder, StageSampler, TimedStage, measure_cuts
from edgeclip.profiles.record.conditions import Interference
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.profiles.sensors.interference import InterferenceWatch
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
from edgeclip.runtime.stats.student_t import estimate_mean
from edgeclip.runtime.wire.codec import codec_name, encode, encode_picture
from edgeclip.runtime.wire.messages import BUNDLE, CODEC, CUT, SPACE_ID, InferRequest

T = TypeVar("T")

BARS: dict[str, Rule] = {
    "largest_p50_error_*": ("<=", 0.10, ""),
    "largest_p95_error_*": ("<=", 0.10, ""),
    "regret_*": ("<=", 0.05, ""),
}
KEPT_MODELS = ("export/emoji_bundle",)
RTT_MS = 20.0
ONE_THREAD = replace(load_device("this-machine"), threads=1)
ROUNDS, QUICK_ROUNDS = 80, 30  # from 72 on a 95th percentile has an upper bound
_TURNS = 2  # of a plan that sends nothing, in a round: its tail is the machine's alone
_CUTS = 3  # inside the tower, the soonest by prediction
_PAUSE_S = 0.25  # between requests: longer than TCP's timeout, so that slow start begins anew
_SMALL, _LARGE = 100, 12_000  # bytes of a probe
_ECHO_JSON, _ECHO_REPLY = 256, 192  # bytes of a probe's JSON, and of its reply
_DEADLINE_MS = 60_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a case is measured at: how often the device repeats its stages, and Mbit/s."""

    slower: int
    mbps: float

    def __str__(self) -> str:
        return f"device {self.slower} times slower, {self.mbps:g} Mbit/s"

    @property
    def name(self) -> str:
        """For bars."""
        return f"{self.slower}_times_slower_{self.mbps:g}_mbps"


CASES = tuple(Conditions(slower=20, mbps=mbps) for mbps in (0.5, 2.0, 8.0, 30.0, 100.0))
CASES += tuple(Conditions(slower=100, mbps=mbps) for mbps in (2.0, 8.0, 100.0))
QUICK_CASES = (Conditions(slower=20, mbps=2.0), Conditions(slower=100, mbps=100.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan in one case: predicted and measured, in milliseconds.

    `p95_level` is the level of the predicted percentile, 0.95 unless there are too few samples.
    """

    conditions: Conditions
    plan: str
    kind: str
    predicted_p50: float
    predicted_p95: float
    p95_level: float
    measured_p50: Interval
    measured_p95: Interval
    chosen: bool

    @property
    def p50_error(self) -> Interval:
        return error_of(self.predicted_p50, self.measured_p50)

    @property
    def p95_error(self) -> Interval:
        return error_of(self.predicted_p95, self.measured_p95)


def error_of(predicted: float, measured: Interval) -> Interval:
    """Predicted / measured - 1; its ends are those of what was measured."""
    low, high = (
        predicted / end - 1 if end > 0 else math.inf for end in (measured.high, measured.low)
    )
    return Interval(predicted / measured.value - 1, low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All plans in one case, and what disturbed it."""

    conditions: Conditions
    rows: tuple[Row, ...]
    interference: Interference

    @property
    def best(self) -> Row:
        """The plan with the lowest measured 95th percentile."""
        return min(self.rows, key=lambda row: row.measured_p95.value)

    @property
    def chosen(self) -> Row:
        """The plan that was chosen beforehand."""
        return next(row for row in self.rows if row.chosen)

    @property
    def regret(self) -> float:
        return self.chosen.measured_p95.value / self.best.measured_p95.value - 1


class Slowness:
    """How often the device does what it does; changes from case to case."""

    times = 1


def slowly(run: Callable[[], T]) -> T:
    """Do something as often as the device is slower."""
    for _ in range(Slowness.times - 1):
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
        pictures = min(rounds, known.pictures)
        here, there = (
            replace(
                known,
                rounds=rounds,
                pictures=pictures,
                payloads=(),
                stages=tuple(side.samples()),
            )
            for side in self.sides
        )
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


def kind_of(plan: SplitPlan) -> str:
    """What a plan sends, for people."""
    if plan.kind == "cut":
        return "cut inside" if plan.cut else "pixels"
    return {"device": "device only", "image": "picture"}.get(plan.kind, plan.kind)


def measure_case(
    conditions: Conditions,
    device: Device,
    works: Mapping[SplitStage, TimedStage],
    times: tuple[StageTimes, StageTimes],
    rounds: int,
) -> Iterator[Row]:
    """Choose beforehand, measure, and predict what was measured."""
    manifest, probe = device.cuts.manifest, Probe(device, conditions.mbps)
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
    link = probe.conditions()
    for item in plans:
        predicted, values = item.predict(times[0], link), np.array(item.latencies)
        assert predicted.plan.p50_ms is not None
        yield Row(
            conditions=conditions,
            plan=predicted.plan.name,
            kind=kind_of(predicted.plan),
            predicted_p50=predicted.plan.p50_ms,
            predicted_p95=predicted.p95_ms,
            p95_level=predicted.p95_level,
            measured_p50=percentile_interval(values, 50),
            measured_p95=percentile_interval(values, 95),
            chosen=predicted.plan.name == choice.best.plan.name,
        )


def table(case: Case) -> str:
    """The plans of one case, the soonest first, and what disturbed it."""
    cells: list[tuple[str, ...]] = [
        ("", "plan", "p50", "predicted", "error", "p95", "predicted", "error")
    ]
    for row in sorted(case.rows, key=lambda row: row.measured_p95.value):
        times = (
            *(f"{row.measured_p50.value:.1f}", f"{row.predicted_p50:.1f}", percents(row.p50_error)),
            *(f"{row.measured_p95.value:.1f}", f"{row.predicted_p95:.1f}", percents(row.p95_error)),
        )
        cells.append((">" if row.chosen else "", row.plan, *times))
    found = case.interference
    disturbed = "; ".join(found.reasons) if found.disturbed else "undisturbed"
    if found.disturbed is None:
        disturbed = "whether it was disturbed is unknown"
    return f"\n{case.conditions}, round trip {RTT_MS:g} ms; {disturbed}\n{columns(cells, left=2)}"


def percents(error: Interval) -> str:
    return span(Interval(100 * error.value, 100 * error.low, 100 * error.high), 1)


def errors_by_kind(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Mean and worst error of each kind of plan.

    Plans of one case share a link and a time of the machine: the intervals are those of the cases.
    """
    rows = [row for case in cases for row in case.rows]
    places = {case.conditions: number for number, case in enumerate(cases)}
    found = []
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        clusters = np.array([places[row.conditions] for row in own])
        about: dict[str, Any] = {"kind": kind, "plans": len(own)}
        for name in ("p50_error", "p95_error"):
            errors = np.array([getattr(row, name).value for row in own])
            mean = estimate_mean(np.log1p(errors), clusters).interval  # of ratios: geometric
            about[name] = Interval(*(math.expm1(end) for end in (mean.value, mean.low, mean.high)))
            about[f"worst_{name}"] = float(errors[np.argmax(np.abs(errors))])
        found.append(about)
    return found


def table_of_kinds(kinds: Sequence[Mapping[str, Any]]) -> str:
    """Errors in percent."""
    cells: list[tuple[str, ...]] = [("kind", "plans", "p50 error", "worst", "p95 error", "worst")]
    for item in kinds:
        told = (
            *(percents(item["p50_error"]), f"{100 * item['worst_p50_error']:+.1f}"),
            *(percents(item["p95_error"]), f"{100 * item['worst_p95_error']:+.1f}"),
        )
        cells.append((item["kind"], str(item["plans"]), *told))
    return f"\nmean error of each kind of plan in %, and its worst\n{columns(cells)}"


def best_plans(cases: Sequence[Case]) -> str:
    """Where another plan than the device alone was best."""
    others = [case for case in cases if case.best.kind != "device only"]
    if not others:
        return "\nThe device alone was best in every case."
    lines = [f"{case.conditions}: {case.best.plan}" for case in others]
    return "\n".join(["", "Another plan than the device alone was best:", *lines])


def bars_of(case: Case) -> Iterator[Bar]:
    name = case.conditions.name
    for of in ("p50_error", "p95_error"):
        worst = max((getattr(row, of) for row in case.rows), key=lambda error: abs(error.value))
        size = worst if worst.value >= 0 else Interval(-worst.value, -worst.high, -worst.low)
        yield hold(BARS, f"largest_{of}_{name}", size)
    yield hold(BARS, f"regret_{name}", case.regret)


def run(folder: Path, cases: Sequence[Conditions], rounds: int) -> Iterator[Case]:
    cuts = write_cuts(Bundle.open(EMOJI_BUNDLE), folder / "cuts", device=ONE_THREAD).cuts
    profile = folder / "one-thread.yaml"
    profile.write_text(device_yaml(ONE_THREAD), encoding="utf-8")
    serve = [*SERVE, str(EMOJI_BUNDLE), "--function", "tests.echo_function:echo", "--insecure"]
    serve += ("--cuts", str(cuts.path), "--device", str(profile), "--host", ADDRESSES["server"])
    shape = Shape(up_mbps=cases[0].mbps, down_mbps=cases[0].mbps, rtt_ms=RTT_MS)
    with (
        shaped_network(shape) as network,
        ServerProcess(network.command("server", serve)) as process,
        network.entered("device"),
        Server(process.url, rules=ClientRules(hedges=False)) as server,
    ):
        about: dict[str, Any] = {"device": ONE_THREAD, "command": command()}
        there = measure_cuts(cuts, rounds=200, **about)
        device, builder = Device(cuts, server), StageBuilder(cuts, ONE_THREAD, cuts.pictures)
        stages = list(builder.picture_stages())
        for point in cuts.manifest.points:
            stages += builder.cut_stages(point)[0]
        works = {work.stage: work for work in stages}
        here: dict[int, StageTimes] = {}
        for each in cases:
            Slowness.times = each.slower
            if each.slower not in here:
                say(f"timing each stage, on the device {each.slower} times over")
                here[each.slower] = measure_cuts(cuts, rounds=32, replace_stage=slower, **about)
            network.shape(Shape(up_mbps=each.mbps, down_mbps=each.mbps, rtt_ms=RTT_MS))
            with InterferenceWatch() as watch:
                rows = tuple(measure_case(each, device, works, (here[each.slower], there), rounds))
            yield Case(conditions=each, rows=rows, interference=watch.found)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--mbps", type=float, nargs="+", help="measure these bandwidths alone")
    args = parser.parse_args()
    wanted = QUICK_CASES if args.quick else CASES
    if args.mbps:
        wanted = tuple(case for case in CASES if case.mbps in args.mbps)
        if not wanted:
            parser.error(f"--mbps: one of {', '.join(f'{case.mbps:g}' for case in CASES)}")
    cases, bars = list[Case](), list[Bar]()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for found in run(Path(folder), wanted, QUICK_ROUNDS if args.quick else ROUNDS):
                print(table(found), flush=True)
                cases.append(found)
                bars += bars_of(found)
    except UnavailableError as error:
        print(f"not measured: {error}")
        return 2
    kinds = errors_by_kind(cases)
    print(table_of_kinds(kinds))
    print(best_plans(cases))
    told = [
        {
            "conditions": case.conditions,
            "best": case.best.plan,
            "chosen": case.chosen.plan,
            "interference": case.interference,
            "rows": [
                asdict(row) | {"p50_error": row.p50_error, "p95_error": row.p95_error}
                for row in case.rows
            ],
        }
        for case in cases
    ]
    return finish(bars, args.out, kinds=kinds, cases=told)


if __name__ == "__main__":
    sys.exit(main())
