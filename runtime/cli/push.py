"""`edgeclip push`: send a bundle, with a model card, to the Hugging Face Hub."""

import argparse
from pathlib import Path

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.hub.push import PushPlan, plan_push, push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("repo", metavar="USER/NAME", help="model repository to send it to")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to send it to (default: main)")
    parser.add_argument("--message", help="commit message (default: the name of the bundle)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be sent, without connecting to the Hub",
    )
    parser.add_argument("--card", type=Path, metavar="FILE", help="also write the model card here")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.card,))


def run(args: argparse.Namespace) -> int:
    """Verify the bundle, then send it, or print what would be sent."""
    plan = plan_push(
        Bundle.open(args.bundle),
        args.repo,
        revision=args.revision,
        private=args.private,
        message=args.message,
    )
    if args.dry_run:
        _print_plan(plan)
        _write_card(plan.card, args.card)
        return 0
    pushed = push(plan)
    for path in pushed.removed:
        print(f"removed {path}, which an earlier bundle had left")
    print(f"{_sum(plan)} in {plan.repo}, branch {plan.revision}, commit {pushed.commit[:12]}")
    print(pushed.url)
    _write_card(pushed.card, args.card)
    return 0


def _print_plan(plan: PushPlan) -> None:
    kind = " (private)" if plan.private else ""
    print(f"would send to {plan.repo}{kind}, branch {plan.revision}: {plan.message}")
    for path, size in plan.sizes().items():
        print(f"{size:>13,}  {path}")
    print(f"{_sum(plan)}; nothing was sent")


def _sum(plan: PushPlan) -> str:
    sizes = plan.sizes()
    return f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.2f} MB"


def _write_card(card: str, target: Path | None) -> None:
    if target is None:
        return
    with atomic_file(target) as path:
        path.write_text(card, encoding="utf-8")
    print(f"model card written to {target}")
