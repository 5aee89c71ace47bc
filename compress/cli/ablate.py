"""`edgeclip ablate`: say what each setting of a recipe buys, with intervals over seeds.

Every option of `edgeclip distill` replaces that setting in the base and in all that it is compared
with. What is chosen on the split `calibration` is judged on the split `test`.
"""

import argparse
from pathlib import Path

from edgeclip.compress.cli.distill import recipe_of
from edgeclip.compress.cli.trial_options import add_trial_options, open_trials, trial_targets
from edgeclip.compress.experiments.ablate import ablate, read_changes, usual_changes
from edgeclip.compress.experiments.ablation_page import ablation_text, write_ablation_page
from edgeclip.profiles.report.write_page import check_page_packages
from edgeclip.runtime.cli.options import Targets

_PAGE, _TABLE, _CHOSEN = "ablation.html", "ablation.json", "chosen.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", help="name or YAML file of the base; see `edgeclip recipes`")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the trials, the table and the page"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE[,VALUE...]",
        help="try these values of a setting, such as losses.affinity=0,2 or, of a list, "
        "dims=[128,64],[64]; may be given several times (default: each loss off or on, each other "
        "choice, other learning rates, the average of the weights, augmented views)",
    )
    add_trial_options(parser, each="recipe", judged="compared")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return trial_targets(args)


def run(args: argparse.Namespace) -> int:
    """Train, compare and write; a run that was stopped goes on where it was."""
    check_page_packages()
    recipe = recipe_of(args, command="ablate")
    changes = read_changes(args.vary, recipe) or usual_changes(recipe)
    trials = open_trials(args, recipe)
    end = ablate(trials, recipe, changes, name=args.recipe, seeds=args.seeds, command=args.command)
    end.table.save(args.out / _TABLE)
    end.chosen.save(args.out / _CHOSEN)
    print(ablation_text(end.table))
    write_ablation_page(end.table, args.out / _PAGE)
    print(f"written to {args.out}: {_PAGE}, {_TABLE}, {_CHOSEN}")
    return 0
