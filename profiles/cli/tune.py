"""`edgeclip tune`: find the fastest engine, precision and threads for a bundle, and keep them.

From then on a bundle that is opened without naming a device runs as was found here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from edgeclip.profiles.measure.tune import Goal, TimedConfig, TowerTuning, devices_here, tune_tower
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import json_fields
from edgeclip.runtime.cli.options import add_json_option, print_json
from edgeclip.runtime.console import columns, digits, interval_ends, progress_bar
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.towers.tuning import (
    Tuning,
    find_tuning,
    machine_state,
    tuning_path,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--goal",
        choices=get_args(Goal),
        default="latency",
        help="the least time of one input, or the most rows per second (default: latency)",
    )
    parser.add_argument(
        "--tower", choices=get_args(Tower), help="only this tower (default: all of the bundle)"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="DEVICE",
        help="try this device's engine too: a name, or a YAML file; may be repeated",
    )
    parser.add_argument(
        "--forget", action="store_true", help="remove what was found for the bundle before"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Tune each tower, print what was measured, and keep the choices."""
    bundle = Bundle.open(args.bundle)
    path = tuning_path(bundle)
    if args.forget:
        path.unlink(missing_ok=True)
        print(f"{args.bundle} runs with its defaults")
        return 0
    devices = (*devices_here(load_device(THIS_MACHINE)), *map(load_device, args.also))
    names = [item.tower for item in bundle.manifest.towers]
    if args.tower is not None:
        bundle.manifest.tower(args.tower)  # refuses a tower that is not there
        names = [args.tower]
    found = []
    for tower in names:
        with progress_bar(f"tune {tower} tower") as progress:
            found.append(tune_tower(bundle, tower, devices, args.goal, progress))
    before = find_tuning(bundle) or Tuning(
        bundle=bundle.sha256, machine=machine_state(), towers=(), command=args.command
    )
    kept = before.with_towers(tuple(item.choice for item in found), command=args.command)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.save(path)
    if args.json:
        print_json({item.tower: _as_json(item) for item in found})
    else:
        print("\n\n".join(map(tuning_table, found)))
        print(f"\nkept in {path}; edgeclip tune {args.bundle} --forget undoes it")
    return 0


def tuning_table(found: TowerTuning) -> str:
    """Return a line for each configuration, the fastest first, then the choice and the rest."""
    head = ("configuration", "ms a row", "interval", "of the default")
    rows = [head, *(_row(item) for item in found.timed)]
    lines = [f"{found.tower} tower", columns(rows, left=1), f"chosen: {found.chosen.config}"]
    lines += [f"left out: {config}: {reason}" for config, reason in found.left_out]
    return "\n".join(lines)


def _row(item: TimedConfig) -> Sequence[str]:
    ms, ratio = item.ms_per_row, item.ratio
    return (
        str(item.config),
        digits(ms.value),
        interval_ends(ms, digits) if item.compared else "only screened",
        "" if ratio is None else f"{ratio.value:.2f} [{interval_ends(ratio, '{:.2f}'.format)}]",
    )


def _as_json(found: TowerTuning) -> dict[str, object]:
    return {
        "default": str(found.default),
        "chosen": str(found.chosen.config),
        "timed": [
            {
                "configuration": str(item.config),
                "ms_per_row": asdict(item.ms_per_row, dict_factory=json_fields),
                "ratio": item.ratio and asdict(item.ratio, dict_factory=json_fields),
                "compared": item.compared,
            }
            for item in found.timed
        ],
        "left_out": [
            {"configuration": config, "reason": reason} for config, reason in found.left_out
        ],
    }
