"""`edgeclip scenes`: draw some of the built-in scenes into a folder, with captions.csv."""

import argparse
import csv
from pathlib import Path
from typing import get_args

from edgeclip.compress.data.emoji_scenes import EmojiScenes, Split
from edgeclip.runtime.bundle.files import atomic_directory
from edgeclip.runtime.cli.options import Targets, zero_or_more
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import TABLE_NAME

# Only this command writes it: captions.csv is in people's own folders too.
_MARKER = ".edgeclip-scenes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--count", type=int, default=100, help="number of scenes (default: 100)")
    parser.add_argument("--size", type=int, default=192, help="side in pixels (default: 192)")
    parser.add_argument("--seed", type=zero_or_more, default=0)


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.folder,))


def run(args: argparse.Namespace) -> int:
    """Write 00000.png and so on, and one table of their captions."""
    if args.count < 1 or args.size < 1:
        raise ConfigError(f"--count and --size must be at least 1, got {args.count}, {args.size}")
    world = EmojiScenes(args.split, seed=args.seed)
    rows = [("file", "caption")]
    with atomic_directory(args.folder, replace=True, marker=_MARKER) as folder:
        for number, scene in enumerate(world.distinct(args.count)):
            rows.append((f"{number:05d}.png", scene.caption))
            world.render(scene, args.size).save(folder / rows[-1][0])
        with (folder / TABLE_NAME).open("w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows(rows)
        (folder / _MARKER).touch()
    print(f"{args.count} scenes with captions in {args.folder}")
    return 0
