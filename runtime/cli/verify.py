"""`edgeclip verify`: check the files of a bundle, and its outputs on this device."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeclip.runtime.bundle.bundle import Bundle, Expected, Golden
from edgeclip.runtime.bundle.files import json_fields
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.bundle.manifest import gates_table
from edgeclip.runtime.cli.options import add_device_option, add_json_option, print_json
from edgeclip.runtime.console import plain_text
from edgeclip.runtime.errors import BundleError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import TowerRunner, usable_precisions

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile

_SAME = 1e-6  # values of embeddings that differ by less are the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    add_device_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check all hashes and replay the golden inputs; return 1 if a tower is out of tolerance."""
    from edgeclip.runtime.device.device_profile import load_device

    device = load_device(args.device)
    bundle = Bundle.open(args.bundle)
    replays = replay_golden(bundle, device)
    passed = all(item.passed for item in replays)
    if args.json:
        print_json(_as_json(bundle, replays, passed=passed))
    else:
        _print_table(bundle, replays)
    return 0 if passed else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Differences of one tower in one precision from its golden embeddings.

    `deviation` is the largest absolute difference of one embedding value, `cosine` the
    smallest cosine of an embedding with the golden one.
    """

    tower: Tower
    precision: Precision
    deviation: float
    cosine: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the manifest's tolerance."""
        return self.deviation <= self.tolerance


def replay_golden(bundle: Bundle, device: "DeviceProfile") -> tuple[Replay, ...]:
    """Run the golden inputs through every tower and precision that the device allows.

    Raises:
        BundleError: the tokenizer's ids differ from the recorded ones, a tower gives all
            inputs one embedding, or the device allows no precision of the bundle.
        EngineError: a tower cannot be loaded or run.
    """
    golden = bundle.golden()
    if bundle.manifest.has("text"):
        _check_tokenizer(bundle, golden)
    found = []
    for item in golden.expected:
        if item.precision in usable_precisions(bundle.manifest.tower(item.tower), device):
            found.append(_replay(bundle, device, golden, item))
    if not found:
        raise BundleError(f"device {device.name!r} allows no precision that the bundle holds")
    return tuple(found)


def _check_tokenizer(bundle: Bundle, golden: Golden) -> None:
    """Tokenize the golden texts again, and compare the ids with the recorded ones.

    Raises:
        BundleError: they differ.
    """
    from edgeclip.runtime.inputs.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.from_file(bundle.tokenizer_path, bundle.manifest.spec.text)
    ids = tokenizer.encode(golden.texts)
    if not np.array_equal(ids, golden.input_ids):
        raise BundleError(
            f"{bundle.tokenizer_path} gives other token ids than when the bundle was written: "
            "install the version of tokenizers that its provenance names"
        )


def _replay(bundle: Bundle, device: "DeviceProfile", golden: Golden, item: Expected) -> Replay:
    manifest = bundle.manifest.tower(item.tower)
    runner = TowerRunner(bundle, item.tower, item.precision, device)
    inputs = golden.inputs(item.tower)
    embeddings = runner.run(inputs)
    if (inputs != inputs[0]).any() and np.abs(embeddings - embeddings[0]).max() < _SAME:
        raise BundleError(
            f"the {item.tower} tower in {item.precision} gives all golden inputs one embedding: it "
            "has collapsed; export a model that tells its inputs apart"
        )
    return Replay(
        tower=item.tower,
        precision=item.precision,
        deviation=float(np.abs(embeddings - item.embeddings).max()),
        cosine=float(cosines(embeddings, item.embeddings).min()),
        tolerance=manifest.file(item.precision).golden_tolerance,
    )


def _as_json(bundle: Bundle, replays: tuple[Replay, ...], *, passed: bool) -> dict[str, object]:
    manifest = bundle.manifest
    return {
        "bundle": manifest.name,
        "space": manifest.space,
        "held_to_teacher": manifest.held_to_teacher,
        "passed": passed,
        "replays": [dataclasses.asdict(item) | {"passed": item.passed} for item in replays],
        "recipes": [
            {"what": what, **dataclasses.asdict(recipe)} for what, recipe in manifest.recipes()
        ],
        "gates": [
            {"what": what, **dataclasses.asdict(gate, dict_factory=json_fields)}
            for what, gate in manifest.all_gates()
        ],
        "remarks": [dataclasses.asdict(remark) for remark in manifest.remarks],
    }


def _print_table(bundle: Bundle, replays: tuple[Replay, ...]) -> None:
    files = bundle.manifest.files
    megabytes = sum(file.bytes for file in files) / 1e6
    print(f"{bundle.manifest.name}: {len(files)} files, {megabytes:.1f} MB, all as declared")
    held = "held against" if bundle.manifest.held_to_teacher else "not held against"
    print(f"embedding space {bundle.manifest.space[:12]}, {held} its teacher by a gate")
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
