"""Options of commands that judge by test pictures."""

import argparse
from typing import get_args

from edgeclip.compress.data.clusters import ClusterBy
from edgeclip.compress.data.sources import EMOJI

TEST_SCENES = 3000  # of `--data emoji`: as many as decide the gates


def add_cluster_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--cluster-by` of commands that judge by pictures of `--data`."""
    parser.add_argument(
        "--cluster-by",
        choices=get_args(ClusterBy),
        help="which test pictures are not independent, so that intervals count them as one: those "
        "of one folder; those of one folder taken within a minute of each other (EXIF); those "
        "nearly the same to the model; or none (default: embedding, and none for emoji)",
    )


def cluster_by(args: argparse.Namespace) -> ClusterBy:
    """Return what `--cluster-by` says, or its default for `--data`."""
    chosen: ClusterBy | None = args.cluster_by
    return chosen or ("none" if args.data == EMOJI else "embedding")
