"""`edgeclip verify`: is a bundle whole, and does this device compute what was exported?

The gates are printed as they were measured when the bundle was written; the device replays
the golden inputs.
"""

import argparse
import dataclasses
from pathlib import Path

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.gates_table import gates_table
from edgeclip.runtime.model_card import plain_text
from edgeclip.runtime.replay_golden import Replay, replay_golden
from edgeclip.runtime.verb_options import add_device_option, add_json_option, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    add_device_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check hashes, then replay the golden inputs; 1 if a tower is out of tolerance."""
    from edgeclip.profiles.device import load_device

    device = load_device(args.device)
    bundle = Bundle.open(args.bundle)
    replays = replay_golden(bundle, device)
    passed = all(item.passed for item in replays)
    if args.json:
        print_json(_as_json(bundle, replays, passed=passed))
    else:
        _print_table(bundle, replays)
    return 0 if passed else 1


def _as_json(bundle: Bundle, replays: tuple[Replay, ...], *, passed: bool) -> dict[str, object]:
    manifest = bundle.manifest
    return {
        "bundle": manifest.name,
        "passed": passed,
        "replays": [dataclasses.asdict(item) | {"passed": item.passed} for item in replays],
        "recipes": [
            {"what": what, **dataclasses.asdict(recipe)} for what, recipe in manifest.recipes()
        ],
        "gates": [
            {"what": what, **dataclasses.asdict(gate)} for what, gate in manifest.all_gates()
        ],
        "remarks": [dataclasses.asdict(remark) for remark in manifest.remarks],
    }


def _print_table(bundle: Bundle, replays: tuple[Replay, ...]) -> None:
    files = bundle.manifest.files
    megabytes = sum(file.bytes for file in files) / 1e6
    print(f"{bundle.manifest.name}: {len(files)} files, {megabytes:.1f} MB, all as declared")
    print(f"{'tower':<6} {'precision':<9} {'deviation':>9} {'tolerance':>9} {'cosine':>9}")
    for item in replays:
        print(
            f"{item.tower:<6} {item.precision:<9} {item.deviation:>9.2g} {item.tolerance:>9.2g} "
            f"{item.cosine:>9.6f}  {'ok' if item.passed else 'OUT OF TOLERANCE'}"
        )
    recipes = list(bundle.manifest.recipes())
    if recipes:
        print("\nhow each was made:")
        for what, recipe in recipes:
            print(f"{what}: {plain_text(recipe.says)}")
    gates = list(bundle.manifest.all_gates())
    if gates:
        print("\ngates, as measured when the bundle was written:")
        print(gates_table(gates, bundle.manifest.remarks))
