"""`edgeclip plan-student`: find the largest student that meets a latency on a device."""

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from edgeclip.compress.built_in import BUILT_IN, BUILT_IN_TEACHER
from edgeclip.compress.cli.options import add_teacher
from edgeclip.compress.students.plan_student import (
    PlannedStudent,
    StudentPlan,
    TeacherSizes,
    describe,
    distill_options,
    plan_student,
    worth_showing,
)
from edgeclip.profiles.predict.measured_device import load_measured, measured_names
from edgeclip.runtime.cli.options import positive
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision, Tower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add_teacher(parser)
    names = ", ".join(measured_names())
    parser.add_argument(
        "--device",
        required=True,
        help="a measured device: a file that `edgeclip measure-probes` wrote"
        + (f", or one of: {names}" if names else ""),
    )
    parser.add_argument(
        "--latency-ms", type=float, required=True, help="the latency budget of one image or text"
    )
    parser.add_argument("--part", choices=get_args(Tower), default="image", help="default: image")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the graph that will run (default: fp32)",
    )
    parser.add_argument(
        "--text-tokens",
        type=positive,
        help="length of a text, start and end included (default: the teacher's whole context)",
    )
    parser.add_argument("--all", action="store_true", help="list every student that was considered")


def run(args: argparse.Namespace) -> int:
    """Print the students, and the command that trains the largest within the budget."""
    if not args.latency_ms > 0:
        raise InputError(f"--latency-ms must be above 0, got {args.latency_ms:g}")
    source = BUILT_IN_TEACHER if args.teacher == BUILT_IN else args.teacher
    plan = plan_student(
        TeacherSizes.read(source),
        load_measured(args.device),
        latency_ms=args.latency_ms,
        part=args.part,
        precision=args.precision,
        text_tokens=args.text_tokens,
    )
    print(_table(plan, plan.students if args.all else worth_showing(plan)))
    print(f"\nHow: {plan.best.prediction.method}.")
    if plan.unknown:
        print(f"{plan.unknown} more sizes lie too far from what was measured to be predicted.")
    if plan.unpredicted or plan.too_small:
        print(_without_prediction(plan, args.part, whole=args.all))
    words = ["edgeclip", "distill", "--teacher", str(args.teacher)]
    words += [*distill_options(plan.best, args.part), "--out", "student"]
    print(f"\nThe largest {args.part} tower that keeps {args.latency_ms:g} ms (*):")
    print(shlex.join(words))
    return 0


def _without_prediction(plan: StudentPlan, part: Tower, *, whole: bool) -> str:
    """Name the families that no probe measures: how many towers, or each with its options."""
    counts = Counter(item.shape.family for item in plan.unpredicted)
    named = ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = []
    if counts:
        lines.append(
            f"\nNot predicted, for no probe measures their blocks: {named}. Train one, and measure "
            "it with `edgeclip profile`" + (":" if whole else " (--all lists them).")
        )
    if whole:
        lines += [
            f"  {describe(item):<38}{item.parameters / 1e6:>9.2f} M{item.share:>11.1%}  "
            + shlex.join(distill_options(item, part))
            for item in plan.unpredicted
        ]
    if plan.too_small:
        lines.append(f"Pictures of this size are too small for {', '.join(plan.too_small)}.")
    return "\n".join(lines)


def _table(plan: StudentPlan, students: Sequence[PlannedStudent]) -> str:
    lines = [f"  {'student':<38}{'parameters':>11}{'of teacher':>11}{'ms':>9}  bounds, level"]
    for item in students:
        mark = "*" if item is plan.best else "+" if item.keeps else " "
        found = item.prediction
        lines.append(
            f"{mark} {describe(item):<38}{item.parameters / 1e6:>9.2f} M{item.share:>11.1%}"
            f"{found.ms:>9.2f}  {found.bounds}"
        )
    lines.append(
        "* the largest whose upper bound keeps the budget, + others that do; a level is the share "
        "of towers like those measured that lie between the bounds"
    )
    return "\n".join(lines)
