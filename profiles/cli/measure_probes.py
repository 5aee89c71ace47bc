"""`edgeclip measure-probes`: measure what each block of a tower costs on this machine."""

import argparse
import statistics
from pathlib import Path

from edgeclip.profiles.predict.measure_probes import FEWEST_ROUNDS, measure_probes, transfer_costs
from edgeclip.profiles.predict.measured_device import MeasuredDevice, load_measured, measured_names
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.probe_set import ProbeSet
from edgeclip.runtime.cli.options import Targets, add_device_option, positive
from edgeclip.runtime.console import interval_ends, progress_bar
from edgeclip.runtime.device.device_profile import load_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
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
        help="measure only a few probes, and transfer the other costs from this measured device: "
        f"a file, or one of {', '.join(measured_names())}",
    )
    add_device_option(parser)


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out,))


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
        measured = transfer_costs(source, measured)
    measured.save(args.out)
    print(measured_table(measured))
    print(f"costs written to {args.out}")
    return 0


def measured_table(measured: MeasuredDevice) -> str:
    """Format a line for each measured block and for each precision's towers, then warnings."""
    lines = [f"{measured.name}: {measured.machine.cpu}, {measured.device.threads} threads", ""]
    lines.append(f"{'block':<12}{'precision':<10}{'width':>6}{'positions':>10}{'ms':>10}  interval")
    lines += [
        f"{cost.piece.kind:<12}{cost.precision:<10}{cost.piece.width:>6}{cost.piece.positions:>10}"
        f"{cost.ms.value:>10.4f}  [{interval_ends(cost.ms, '{:.4f}'.format, ', ')}]"
        for cost in measured.costs
        if cost.samples_ms
    ]
    lines.append("")
    predictor = Predictor(measured)
    for precision in measured.precisions:
        errors = [abs(predicted / ms - 1) for predicted, ms in predictor.checks(precision)]
        if errors:
            lines.append(
                f"{len(errors)} whole tower{'s' * (len(errors) > 1)} in {precision}: predicted "
                f"within {statistics.median(errors):.1%} (median; worst {max(errors):.1%})"
            )
    if measured.carried is not None:
        carried = measured.carried
        lines.append(
            f"The rest was transferred from {carried.source}: {carried.probes} blocks were "
            f"measured on both, and predict each other within {carried.error:.0%} (median; "
            f"{carried.level:.1%} of them within {carried.bound:.0%})."
        )
    found = measured.interference
    if found is not None and found.disturbed:
        lines.append(f"DISTURBED: {'; '.join(found.reasons)}. Measure again on a quiet machine.")
    return "\n".join(lines)
