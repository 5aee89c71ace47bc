"""`edgeclip plan`: choose what runs on the device and what on a server, from measured times."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from edgeclip.profiles.cuts.plan_report import explain, plan_chart, plan_page, plan_table
from edgeclip.profiles.predict.measured_device import measured_names
from edgeclip.profiles.predict.predict_stages import (
    StageTimesPair,
    load_stage_times,
    prediction_headings,
    prediction_remarks,
)
from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.report.drawing import svg
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.console import interval_ends
from edgeclip.runtime.device.link import LinkProfile, link_names, load_link
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import Objective, PlanChoice, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.plan import Goal
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.stats.interval import Interval

_HTTP_MS = 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("cuts", type=Path, help="directory that `edgeclip cut` wrote")
    what = (
        "file that `edgeclip measure-cuts` wrote on the {}; for one side also a measured device, "
        f"from which times are predicted: a file of `edgeclip measure-probes`{_measured_names()}"
    )
    for side in ("device", "server"):
        parser.add_argument(
            f"--{side}-times", metavar="TIMES", required=True, help=what.format(side)
        )
    parser.add_argument(
        "--link", required=True, help=f"a YAML file, or one of: {', '.join(link_names())}"
    )
    parser.add_argument(
        "--http-ms",
        type=float,
        default=_HTTP_MS,
        help=f"time of HTTP in both programs for one request (assumed: {_HTTP_MS})",
    )
    parser.add_argument(
        "--goal",
        choices=get_args(Goal),
        default="embedding",
        help="where the result is needed: the embedding on the device, or a search on the server "
        "(default: embedding)",
    )
    parser.add_argument("--index", default="index", help="the server's index, for --goal search")
    _add_conditions(parser)
    parser.add_argument("--all", action="store_true", help="list every plan in every codec")
    parser.add_argument("--out", type=Path, help="write the chosen plan to this JSON file")
    parser.add_argument(
        "--measured",
        type=Path,
        action="append",
        default=[],
        help="a run of `edgeclip profile --plan`, to compare the predictions with",
    )
    parser.add_argument("--picture", type=Path, help="draw the plans: NAME.svg or NAME.html")


def _measured_names() -> str:
    names = ", ".join(measured_names())
    return f", or one of: {names}" if names else ""


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    numbers = {
        "--deadline-ms": (None, "upper bound of the 95th percentile of the latency"),
        "--load": (1.0, "factor by which the device is slower than when it was measured"),
        "--utilisation": (0.0, "share of time that the server is busy with other clients, below 1"),
        "--ms-per-joule": (0.0, "weight of energy on the device: milliseconds per joule"),
        "--ms-per-megabyte": (0.0, "weight of traffic: milliseconds per 10^6 bytes sent"),
        "--ms-per-server-second": (0.0, "weight of server time: milliseconds per second of it"),
        "--mean-cosine": (0.99, "least mean cosine of embeddings through a codec and exact ones"),
        "--least-cosine": (0.97, "least cosine of any picture"),
    }
    for name, (default, words) in numbers.items():
        note = "" if default is None else f" (default: {default:g})"
        parser.add_argument(name, type=float, default=default, help=words + note)


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out, args.picture))


def run(args: argparse.Namespace) -> int:
    """Print all plans and the chosen one; write the requested files."""
    cuts = CutSet.open(args.cuts)
    sides = load_stage_times(args.device_times, args.server_times, cuts)
    link = load_link(args.link)
    try:
        objective, conditions = _objective(args), _conditions(args, cuts, link)
    except ValueError as error:
        raise InputError(str(error)) from None

    def choose(sides: StageTimesPair) -> PlanChoice:
        found = estimate_plans(
            cuts.manifest, *sides, conditions, deadline_ms=args.deadline_ms, index=args.index
        )
        return choose_plan(found, objective)

    choice = choose(sides)
    notes = [*prediction_remarks(sides, choice, choose), *_notes(args, *sides)]
    words = "\n".join([explain(choice, objective), *notes])
    print("\n".join([*prediction_headings(sides), plan_table(choice, all_codecs=args.all)]))
    print(f"\n{words}")
    for path in args.measured:
        print("\n".join(_prediction_errors(path, (*choice.allowed, *choice.refused))))
    if args.out is not None:
        choice.best.plan.save(args.out)
        print(f"plan written to {args.out}")
    if args.picture is not None:
        _draw(args, choice, words)
        print(f"picture written to {args.picture}")
    return 0


def _measured_p95(measured: Interval | None, predicted: float) -> str:
    if measured is None:
        return "in too few runs to know it"
    ends = interval_ends(measured, "{:.1f}".format, ", ")
    return f"{measured.value:.1f} ms [{ends}], error {predicted / measured.value - 1:+.1%}"


def _prediction_errors(path: Path, estimates: Sequence[PlanEstimate]) -> list[str]:
    """Compare predicted and measured 95th percentiles, one line for each plan."""
    predicted = {item.plan.name: item.p95_ms for item in estimates}
    measured = MeasurementRun.load(path).measurements
    lines = [
        f"{item.name}: predicted p95 {predicted[item.name]:.1f} ms, measured "
        + _measured_p95(item.latency.p95_ms, predicted[item.name])
        for item in measured
        if item.part == "split" and item.name in predicted
    ]
    if not lines:
        raise InputError(
            f"{path} measured none of these plans: run `edgeclip profile BUNDLE --plan PLAN.json`"
        )
    return lines


def _objective(args: argparse.Namespace) -> Objective:
    return Objective(
        ms_per_joule=args.ms_per_joule,
        ms_per_megabyte=args.ms_per_megabyte,
        ms_per_server_second=args.ms_per_server_second,
        deadline_ms=args.deadline_ms,
        mean_cosine=args.mean_cosine,
        least_cosine=args.least_cosine,
    )


def _conditions(args: argparse.Namespace, cuts: CutSet, link: LinkProfile) -> PlanConditions:
    return PlanConditions(
        link=LinkState.from_profile(link, http_ms=args.http_ms),
        dim=cuts.manifest.dim,
        load=args.load,
        utilisation=args.utilisation,
        goal=args.goal,
    )


def _notes(args: argparse.Namespace, device: StageTimes, server: StageTimes) -> list[str]:
    """List what is assumed, and warn of disturbed measurements."""
    notes = [
        f"Link {args.link} as its profile describes it, and {args.http_ms:g} ms for HTTP: both "
        "are assumed until they are measured there."
    ]
    if args.utilisation > 0:
        notes.append(
            f"The wait for a server that is busy {args.utilisation:.0%} of the time is that "
            "of one worker and requests at random times (M/G/1): bursts wait longer, several "
            "workers less."
        )
    else:
        notes.append("No wait for the server is assumed: --utilisation tells how busy it is.")
    notes += [
        f"The times of the {side} were measured on a contended machine: measure again."
        for side, times in (("device", device), ("server", server))
        if times.contended
    ]
    if args.goal == "search":
        notes.append("The search itself is left out: it takes as long in every plan.")
    return notes


def _draw(args: argparse.Namespace, choice: PlanChoice, words: str) -> None:
    if args.picture.suffix not in (".svg", ".html"):
        raise InputError(f"--picture is {args.picture}: give a name that ends in .svg or .html")
    chart = plan_chart(choice, title=f"Plans over {args.link}", deadline_ms=args.deadline_ms)
    if args.picture.suffix == ".html":
        write_html(plan_page(chart, choice, words=words), args.picture)
        return
    content = svg(chart, alone=True)
    with atomic_file(args.picture) as temporary:
        temporary.write_text(content, encoding="utf-8")
