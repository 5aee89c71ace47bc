"""Options and output that several commands of this room share."""

import argparse
import sys

from edgeclip.compress.data.sources import EMOJI


def add_pairs_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--data`, a source that `open_source` splits."""
    parser.add_argument(
        "--data",
        default=EMOJI,
        help="emoji, or a folder of pictures with captions, which is split by its subfolders "
        "train, calibration and test, or else by a hash of the file names (default: emoji)",
    )


def say(line: str) -> None:
    """Print the next step to stderr."""
    print(f"{line} ...", file=sys.stderr, flush=True)
