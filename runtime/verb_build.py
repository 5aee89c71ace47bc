"""`edgeclip build`: build and check the TensorRT engines of a bundle on the device itself."""

import argparse
import time
from pathlib import Path
from typing import get_args

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.open_tower import open_tower
from edgeclip.runtime.spec import Precision, Tower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--device", required=True, help="name of a device with TensorRT, or its YAML file"
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=get_args(Precision),
        help="may be given several times (default: all that bundle and device have)",
    )


def run(args: argparse.Namespace) -> int:
    """Build what is missing; 1 if an engine cannot be built or is wrong."""
    from edgeclip.profiles.device import load_device

    device = load_device(args.device)
    if device.engine not in ("tensorrt", "tensorrt-rtx"):
        raise InputError(
            f"device {device.name!r} runs {device.engine}, which needs no engines: use the bundle "
            "as it is"
        )
    bundle = Bundle.open(args.bundle)
    failed = False
    for tower in get_args(Tower):
        for precision in _precisions(bundle, tower, device, args.precision):
            began = time.perf_counter()
            try:
                open_tower(bundle, tower, precision, device)
                print(f"{tower} {precision}: ready in {time.perf_counter() - began:.0f} s")
            except EngineError as error:
                failed = True
                print(f"{tower} {precision}: {error}")
    return 1 if failed else 0


def _precisions(
    bundle: Bundle, tower: Tower, device: object, asked: list[Precision] | None
) -> tuple[Precision, ...]:
    from edgeclip.profiles.device import DeviceProfile

    assert isinstance(device, DeviceProfile)
    usable = usable_precisions(bundle.manifest.tower(tower), device)
    wanted = tuple(item for item in usable if asked is None or item in asked)
    if not wanted:
        raise InputError(
            f"device {device.name!r} can run none of the asked precisions of the {tower} tower: "
            f"choose from {', '.join(usable) or 'another bundle'}"
        )
    return wanted
