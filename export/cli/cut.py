"""`edgeclip cut`: cut a bundle's image tower into halves for a device and a server."""

import argparse
import math
from pathlib import Path
from typing import get_args

from edgeclip.compress.data.sources import EMOJI
from edgeclip.export.cuts.write_cuts import WrittenCuts, write_cuts
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.options import Targets, add_device_option, positive
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import WEIGHTS_NAME
from edgeclip.runtime.spec import Precision, Tower

_ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("--out", type=Path, required=True, help="directory of the cut set")
    parser.add_argument(
        "--tower",
        choices=get_args(Tower),
        default="image",
        help="the tower to cut (default: image)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="precision of the tower (default: the one that the bundle ships)",
    )
    parser.add_argument(
        "--points",
        default=_ALL,
        help="the cuts to write: all, or numbers such as 1,3; cut 0, the pixels, is always written "
        "(default: all)",
    )
    parser.add_argument(
        "--pictures",
        default=EMOJI,
        help="a folder of pictures to measure with, or emoji for built-in scenes (default: emoji)",
    )
    parser.add_argument(
        "--count", type=positive, default=32, help="the largest number of pictures (default: 32)"
    )
    add_device_option(parser)
    parser.add_argument("--replace", action="store_true", help="replace an existing cut set")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Write the cut set and list its cuts."""
    if args.tower == "text":
        raise InputError(
            "a text is smaller than anything inside its tower: send the text, and cut the image "
            "tower only"
        )
    written = write_cuts(
        Bundle.open(args.bundle),
        args.out,
        device=load_device(args.device),
        precision=args.precision,
        points=_points(args.points),
        pictures=args.pictures,
        count=args.count,
        replace=args.replace,
    )
    print(_summary(written))
    return 0


def _points(text: str) -> tuple[int, ...] | None:
    if text == _ALL:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 6 for word in words):
        raise InputError(f"--points is {text[:40]!r}: give all, or numbers such as 1,3")
    return tuple(map(int, words))


def _summary(written: WrittenCuts) -> str:
    cuts = written.cuts
    lines = [f"{'cut':>3}  {'where':<20}{'shape':<16}{'values':>9}"]
    for point in cuts.manifest.points:
        shape = " x ".join(map(str, point.shape))
        lines.append(f"{point.number:>3}  {point.name:<20}{shape:<16}{math.prod(point.shape):>9,}")
    weights = next((f.bytes for f in cuts.manifest.files if f.path == WEIGHTS_NAME), 0)
    lines.append(
        f"halves differ from the whole by at most {written.difference:.1e} in a value of an "
        "embedding"
    )
    lines.append(f"cut set written to {cuts.path}, {weights / 1e6:,.1f} MB of weights, kept once")
    return "\n".join(lines)
