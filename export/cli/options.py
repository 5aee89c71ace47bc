"""Options and output that several commands of this room share."""

import argparse
import sys

from edgeclip.compress.data.sources import EMOJI


def add_pairs_option(parser: argparse.ArgumentParser) -> None:
    """Add `--data`, which `open_source` divides."""
    parser.add_argument(
        "--data",
        default=EMOJI,
        help="emoji, or a folder of pictures with captions: it is divided by its subfolders "
        "train, calibration and test if it has them, or else by itself (default: emoji)",
    )


def say(line: str) -> None:
    """Print the next step to stderr."""
    print(f"{line} ...", file=sys.stderr, flush=True)
