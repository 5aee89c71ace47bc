"""`edgeclip device`: list the known devices, or print a device profile as YAML to edit."""

import argparse
from pathlib import Path

from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.device.device_profile import (
    THIS_MACHINE,
    device_names,
    device_yaml,
    load_device,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "name",
        nargs="?",
        default=THIS_MACHINE,
        help=f"a YAML file, or one of: {', '.join(device_names())} (default: {THIS_MACHINE})",
    )
    parser.add_argument("--list", action="store_true", help="list the known devices instead")
    parser.add_argument("--out", type=Path, help="write the YAML to this file, do not print it")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Print or write the profile, or list the devices."""
    if args.list:
        for name in device_names():
            print(f"{name:18} {load_device(name).description}")
        return 0
    text = device_yaml(load_device(args.name))
    if args.out is None:
        print(text, end="")
        return 0
    with atomic_file(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"device profile in {args.out}")
    return 0
