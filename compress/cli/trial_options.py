"""Options that the commands which train trials of a recipe have in common."""

import argparse
from pathlib import Path

from edgeclip.compress.cli.distill import add_settings
from edgeclip.compress.cli.options import max_bad
from edgeclip.compress.experiments.trials import Trials
from edgeclip.compress.train.recipe import DistillRecipe
from edgeclip.runtime.cli.options import Targets, positive


def add_trial_options(parser: argparse.ArgumentParser, *, each: str, judged: str) -> None:
    """Declare seeds, pairs, cache and the settings of a recipe.

    Args:
        parser: gets the options.
        each: what is trained at every seed, for the help.
        judged: what is done with students on the pairs.
    """
    parser.add_argument("--seeds", type=positive, default=3, help=f"of each {each} (default: 3)")
    parser.add_argument(
        "--pairs",
        type=positive,
        default=1000,
        help=f"scenes that students are {judged} on; of other data all of the split "
        "(default: 1000)",
    )
    parser.add_argument(
        "--cache", type=Path, help="directory of the teacher cache (default: OUT/cache)"
    )
    add_settings(parser)


def trial_targets(args: argparse.Namespace) -> Targets:
    """Return what such a command writes."""
    return Targets(folders=(args.out,), shared=(args.cache,))


def open_trials(args: argparse.Namespace, recipe: DistillRecipe) -> Trials:
    """Open the teacher and the pairs that students are judged on.

    Raises:
        ConfigError, InputError: see `Trials`.
    """
    return Trials(
        recipe,
        args.out,
        pairs=args.pairs,
        cache=args.cache,
        strict=args.strict,
        max_bad=max_bad(args),
    )
