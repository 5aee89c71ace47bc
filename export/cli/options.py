"""Options and output that several commands of this room share."""

import argparse
import logging

from edgeclip.compress.data.sources import EMOJI

_log = logging.getLogger(__name__)


def add_pairs_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--data`, a source that `open_source` splits."""
    parser.add_argument(
        "--data",
        default=EMOJI,
        help="emoji, or a folder of pictures with captions, which is split by its subfolders "
        "train, calibration and test, or else by a hash of each path (default: emoji)",
    )


def say(line: str) -> None:
    """Log the next step."""
    _log.info("%s ...", line)
