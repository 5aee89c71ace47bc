"""`edgeclip demo`: run the whole pipeline on the built-in data, and write a report."""

import argparse
from dataclasses import replace
from pathlib import Path

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.runtime.cli.options import Targets, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory of all results"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="skip the training, and measure the bundle of the repository",
    )
    parser.add_argument("--steps", type=positive, help="number of distillation steps")
    parser.add_argument("--scenes", type=positive, help="number of training scenes")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(folders=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Run the demo and print where the report is; return 1 if a bar was missed."""
    built_in_teacher()  # before torch is imported, which someone may install for nothing
    from edgeclip.export.demo.demo import DemoSettings, run_demo

    settings = DemoSettings(quick=args.quick)
    given = {"steps": args.steps, "count": args.scenes}
    changed = {name: value for name, value in given.items() if value is not None}
    recipe = settings.recipe.replaced(changed, source="edgeclip demo")
    settings = replace(settings, recipe=recipe)
    summary = run_demo(settings, args.out, command=args.command)
    print(f"\nreport: {args.out / 'report.html'}")
    return 0 if summary.keeps_enough and summary.fast_enough else 1
