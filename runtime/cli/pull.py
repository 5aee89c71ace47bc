"""`edgeclip pull`: fetch a bundle from the Hugging Face Hub, whole and verified or not at all."""

import argparse
import shlex
from pathlib import Path

from edgeclip.runtime.bundle.manifest import Manifest
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.console import plain_text
from edgeclip.runtime.hub.pull import pull


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("repo", metavar="USER/NAME", help="model repository that holds a bundle")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the bundle to")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--replace", action="store_true", help="replace a bundle that is there")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Download and verify a bundle, and print its size and gates."""
    pulled = pull(args.repo, args.out, revision=args.revision, replace=args.replace)
    manifest = pulled.bundle.manifest
    total = sum(file.bytes for file in manifest.files) / 1e6
    name, count = plain_text(manifest.name), len(manifest.files)
    print(
        f"{name}: {count} files, {total:,.2f} MB, all as declared, "
        f"of {args.repo} at {pulled.commit[:12]}"
    )
    print(_gates(manifest))
    print(f"next: edgeclip verify {shlex.quote(str(args.out))}")
    return 0


def _gates(manifest: Manifest) -> str:
    """Count the recorded gates, which `Bundle.open` checked, and list those of the whole bundle."""
    gates = list(manifest.all_gates())
    if not gates:
        return "gates: none was measured"
    lines = [f"gates: {len(gates)} recorded, all met"]
    lines += [
        f"  {plain_text(gate.name)}: {gate.value:.4g} {plain_text(gate.unit)} "
        f"(bound {gate.direction} {gate.bound:g})"
        for gate in manifest.gates
    ]
    lines += [f"  warning: {plain_text(str(remark))}" for remark in manifest.remarks]
    return "\n".join(lines)
