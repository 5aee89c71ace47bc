"""Options that several commands of training and export share, and what they load."""

import argparse
import logging

from edgeclip.compress.built_in import BUILT_IN, model_source
from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import EMOJI, Source
from edgeclip.compress.processes import processes
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.cli.options import zero_or_more
from edgeclip.runtime.inputs.find_images import MaxBad

_log = logging.getLogger(__name__)


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """Add the option `--teacher`."""
    parser.add_argument(
        "--teacher",
        default=BUILT_IN,
        help="directory or hub id of a Hugging Face dual encoder (default: the built-in one, "
        "trained on EmojiScenes)",
    )


def add_data(parser: argparse.ArgumentParser, *, count: int) -> None:
    """Add the options `--data` and `--count`."""
    parser.add_argument(
        "--data",
        action="append",
        help="emoji, a folder of pictures, WebDataset shards, or data of Hugging Face, see "
        "docs/data.md; may be given several times, each with =WEIGHT behind it (default: emoji, "
        "the built-in scenes)",
    )
    parser.add_argument(
        "--count",
        type=zero_or_more,
        default=count,
        help=f"number of built-in scenes (default: {count})",
    )
    add_strict(parser)


def max_bad(args: argparse.Namespace) -> MaxBad:
    """Return how many pictures may be unreadable: none with `--strict`, else `--max-bad`."""
    limit: MaxBad = args.max_bad
    return MaxBad(share=0.0, count=0) if args.strict else limit


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Add the option `--strict`."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a folder with files that would be left out, or pictures that cannot be read "
        "(default: name what is left out)",
    )


def load_teacher(args: argparse.Namespace) -> DualEncoder:
    """Load the teacher of `--teacher`, on the fastest torch device."""
    return DualEncoder.load(model_source(args.teacher)).to(processes().device)


def load_source(args: argparse.Namespace, teacher: DualEncoder, *, split: Split) -> Source:
    """Open the data of `--data` and `--count`."""
    size = teacher.image_spec.size
    return open_source(
        args.data or [EMOJI], split=split, count=args.count, size=size, strict=args.strict
    )


def add_pairs_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--data`, a source that `open_source` splits."""
    parser.add_argument(
        "--data",
        default=EMOJI,
        help="emoji, or a folder of pictures with captions, which is split by its subfolders "
        "train, calibration and test, or else by a hash of each path (default: emoji)",
    )
    add_strict(parser)


def log_step(line: str) -> None:
    """Log what the command does next."""
    _log.info("%s ...", line)


def open_split(args: argparse.Namespace, split: Split, *, count: int, size: int) -> Source:
    """Open a split of `--data` by `--strict` and `--max-bad`; `count` is of built-in scenes.

    Raises:
        ConfigError, InputError: see `open_source`.
    """
    return open_source(
        args.data,
        split=split,
        count=count,
        size=size,
        strict=args.strict,
        max_bad=max_bad(args),
    )
