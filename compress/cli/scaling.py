"""`edgeclip scaling`: train several sizes of a student, and say which meets a bar.

Every option of `edgeclip distill` replaces that setting in all sizes. Students are judged on the
split `test`.
"""

import argparse
from pathlib import Path
from typing import Any

from edgeclip.compress.cli.distill import recipe_of
from edgeclip.compress.cli.trial_options import add_trial_options, open_trials, trial_targets
from edgeclip.compress.experiments.scaling import scaling, usual_sizes
from edgeclip.compress.experiments.scaling_page import scaling_text, write_scaling_page
from edgeclip.compress.experiments.spelling import read_value, settings_of, split_values
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.profiles.report.write_page import check_page_packages
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.errors import InputError

_PAGE, _TABLE = "scaling.html", "scaling.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", help="name or YAML file of settings; see `edgeclip recipes`")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the trials, the table and the page"
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="SETTING=VALUE[,SETTING=VALUE...]",
        help="sizes of a student, such as image_layers=2,image_heads=1 or, of a list, "
        "conv_widths=[24,48,96]; give four or more (default: six parts of the teacher, both towers "
        "in proportion)",
    )
    parser.add_argument(
        "--bar", type=float, default=0.95, help="share of the teacher's R@1 to keep (default: 0.95)"
    )
    add_trial_options(parser, each="size", judged="judged")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return trial_targets(args)


def run(args: argparse.Namespace) -> int:
    """Train, fit and write; a run that was stopped goes on where it was."""
    if not 0 < args.bar < 1:
        raise InputError(f"--bar is a share of the teacher's R@1, above 0 and below 1: {args.bar}")
    check_page_packages()
    recipe = recipe_of(args, command="scaling")
    sizes = [_size(text, recipe) for text in args.size]
    trials = open_trials(args, recipe)
    table = scaling(
        trials,
        recipe,
        sizes or usual_sizes(trials.teacher_model, recipe),
        name=args.recipe,
        seeds=args.seeds,
        bar=args.bar,
        command=args.command,
    )
    table.save(args.out / _TABLE)
    print(scaling_text(table))
    write_scaling_page(table, args.out / _PAGE)
    print(f"written to {args.out}: {_PAGE}, {_TABLE}")
    return 0


def _size(text: str, recipe: DistillRecipe) -> dict[str, Any]:
    """Read a value of `--size`.

    Raises:
        InputError: not of the form SETTING=VALUE,..., or no setting of a student.
    """
    every = settings_of(recipe).items()
    known = {name: hint for name, (section, hint, _) in every if section == "student"}
    size: dict[str, Any] = {}
    for item in split_values(text):
        name, _, value = item.partition("=")
        if name not in known or not value:
            raise InputError(
                f"--size {text}: {item} is not SETTING=VALUE, with a setting of: {', '.join(known)}"
            )
        try:
            size[name] = read_value(value, known[name])
        except InputError as error:
            raise InputError(f"--size {text}: {error}") from error
    return size
