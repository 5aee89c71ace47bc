"""`edgeclip recipes`: list the recipes of `distill --recipe`, or print one."""

import argparse

from edgeclip.compress.train.recipe import recipe_names, recipe_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", help="print the YAML of this one")


def run(args: argparse.Namespace) -> int:
    """Print a recipe, or the comment at the head of each."""
    if args.name:
        print(recipe_text(args.name), end="")
        return 0
    for name in recipe_names():
        comment = [
            line.removeprefix("#").strip()
            for line in recipe_text(name).splitlines()
            if line.startswith("#")
        ]
        print(f"{name}\n    {' '.join(comment)}")
    return 0
