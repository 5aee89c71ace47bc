"""Options that several commands have in common."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from edgeclip.runtime.spec import Precision

if TYPE_CHECKING:
    from edgeclip.runtime.encoder import Encoder


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add `--bundle`, `--device`, `--precision` and `--batch-size`."""
    parser.add_argument("--bundle", type=Path, required=True, help="directory of the bundle")
    add_device_option(parser)
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="precision of both towers (default: the bundle's choice for each)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="images or texts per batch (default: 32)"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        default="this-machine",
        help="name of a device, or its YAML file (default: this-machine)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs to read")


def open_encoder(args: argparse.Namespace) -> "Encoder":
    """Open the encoder for the options of `add_encoder_options`."""
    from edgeclip.runtime.encoder import Encoder  # imports Pillow, which few commands need

    return Encoder.open(args.bundle, device=args.device, precision=args.precision)


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on stdout, in ASCII, which every console and pipe can carry."""
    print(json.dumps(value, indent=2, allow_nan=False))


def positive(text: str) -> int:
    """Convert an argument to a whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
