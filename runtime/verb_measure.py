"""`edgeclip measure`: latency, throughput, cold start and memory of a bundle on this machine."""

import argparse
import shlex
from pathlib import Path

from edgeclip.profiles.device import load_device
from edgeclip.profiles.workload import load_workload, workload_names
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.measuring.measure_bundle import measure_bundle
from edgeclip.runtime.measuring.measurement_table import measurement_table
from edgeclip.runtime.verb_options import add_device_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--workload",
        default="demo",
        help=f"a YAML file, or one of: {', '.join(workload_names())} (default: demo)",
    )
    add_device_option(parser)
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")


def run(args: argparse.Namespace) -> int:
    """Measure every tower and precision, and print a table."""
    workload, device = load_workload(args.workload), load_device(args.device)
    result = measure_bundle(
        Bundle.open(args.bundle),
        device=device,
        workload=workload,
        command=_command(args),
    )
    if args.out is not None:
        result.save(args.out)
    print(measurement_table(result))
    return 0


def _command(args: argparse.Namespace) -> str:
    words = ["edgeclip", "measure", str(args.bundle), "--workload", str(args.workload)]
    words += ["--device", str(args.device)]
    words += [] if args.out is None else ["--out", str(args.out)]
    return shlex.join(words)
