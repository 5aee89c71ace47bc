"""`edgeclip measure-cuts`: time every stage of every split plan on this machine."""

import argparse
from pathlib import Path

from edgeclip.profiles.cuts.measure_cuts import measure_cuts, stage_table
from edgeclip.runtime.cli.options import Targets, add_device_option, positive
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.inputs.find_images import find_images, readable_images
from edgeclip.runtime.planning.cut_set import CutSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("cuts", type=Path, help="directory that `edgeclip cut` wrote")
    parser.add_argument("--out", type=Path, required=True, help="write the times to this JSON file")
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs="+",
        default=[],
        help="image files or folders (default: those in the cut set)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=100, help="samples of each stage (default: 100)"
    )
    add_device_option(parser)


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Measure all stages, write their times, print the medians."""
    cuts, device = CutSet.open(args.cuts), load_device(args.device)
    pictures = readable_images(find_images(args.pictures), most=args.rounds)
    with progress_bar("measure") as progress:
        times = measure_cuts(
            cuts,
            device=device,
            command=args.command,
            pictures=pictures,
            rounds=args.rounds,
            progress=progress,
        )
    times.save(args.out)
    print(stage_table(times, cuts.manifest))
    print(f"times written to {args.out}")
    return 0
