"""`edgeclip probes`: write small graphs from whose times any student's latency is predicted."""

import argparse
import shlex
from pathlib import Path

from edgeclip.export.probes.probe_plan import PLANS
from edgeclip.export.probes.write_probes import write_probes
from edgeclip.runtime.cli.options import Targets, add_device_option, zero_or_more
from edgeclip.runtime.device.device_profile import load_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--out", type=Path, required=True, help="directory of the probes")
    parser.add_argument(
        "--plan",
        choices=tuple(PLANS),
        default="standard",
        help="how many: standard takes some minutes; small is for trying things out "
        "(default: standard)",
    )
    parser.add_argument("--seed", type=zero_or_more, default=0, help="of the weights")
    add_device_option(parser)
    parser.add_argument("--replace", action="store_true", help="replace a set that is there")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Write the set, and print the command that measures it."""
    probes = write_probes(
        args.out,
        device=load_device(args.device),
        command=args.command,
        plan=PLANS[args.plan],
        seed=args.seed,
        replace=args.replace,
    )
    index = probes.index
    size = sum(file.bytes for file in index.files) / 1e6
    print(
        f"{len(index.probes)} probes and {len(index.checks)} whole towers in {args.out}, "
        f"{size:,.1f} MB\n"
        "copy them to the device, and measure there: "
        f"edgeclip measure-probes {shlex.quote(args.out.name)} --out measured.json"
    )
    return 0
