"""`edgeclip measure-probes`: what the pieces of a tower cost on this machine."""

import argparse
from pathlib import Path

from edgeclip.profiles.predict.measure_probes import (
    FEWEST_ROUNDS,
    carry_over,
    measure_probes,
    measured_table,
)
from edgeclip.profiles.predict.measured_device import load_measured, measured_names
from edgeclip.profiles.predict.probe_set import ProbeSet
from edgeclip.runtime.cli.options import add_device_option, positive
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.device_profile import load_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument("probes", type=Path, help="directory that `edgeclip probes` wrote")
    parser.add_argument("--out", type=Path, required=True, help="write the costs to this JSON file")
    parser.add_argument("--name", help="what to call the device (default: the name of --out)")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=30,
        help=f"samples of each probe, at least {FEWEST_ROUNDS} (default: 30)",
    )
    parser.add_argument(
        "--few-from",
        metavar="MEASURED",
        help="measure only a few probes, and carry the rest over from this measured device: "
        f"a file, or one of {', '.join(measured_names())}",
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the costs, and print them."""
    probes, device = ProbeSet.open(args.probes), load_device(args.device)
    source = None if args.few_from is None else load_measured(args.few_from)
    with progress_bar("measure") as progress:
        measured = measure_probes(
            probes,
            device=device,
            name=args.name or args.out.stem,
            command=args.command,
            rounds=args.rounds,
            few=source is not None,
            progress=progress,
        )
    if source is not None:
        measured = carry_over(source, measured)
    measured.save(args.out)
    print(measured_table(measured))
    print(f"costs written to {args.out}")
    return 0
