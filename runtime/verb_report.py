"""`edgeclip report`: what a bundle's manifest and measurements of it say, as one HTML page.

`edgeclip demo` writes a fuller one, with the training, the quality and a gallery.
"""

import argparse
from pathlib import Path

from edgeclip.profiles.machine import detect_machine
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.measuring.measurement import MeasurementRun
from edgeclip.runtime.reporting.report_data import Choice, Gate, ReportData
from edgeclip.runtime.reporting.write_report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--measurements", type=Path, help="JSON file that `edgeclip measure --out` wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    bundle = Bundle.open(args.bundle)
    measured = None if args.measurements is None else MeasurementRun.load(args.measurements)
    write_report(bundle_report(bundle, measured), args.out)
    print(f"report in {args.out}")
    return 0


def bundle_report(bundle: Bundle, measured: MeasurementRun | None) -> ReportData:
    """A report of a bundle: choices, gates, provenance, and measurements if there are any.

    The machine is the one that was measured, else this one.
    """
    manifest = bundle.manifest
    origin = manifest.provenance
    commands = (origin.command,) if measured is None else (origin.command, measured.command)
    why = "Chosen when the bundle was written."
    return ReportData(
        title=manifest.name,
        summary=f"A bundle of {origin.student}, distilled from {origin.teacher} on {origin.data}.",
        created=origin.created,
        headlines=(),
        choices=tuple(Choice(item.tower, item.chosen, why) for item in manifest.towers),
        stages=(),
        quality=(),
        measurements=() if measured is None else measured.measurements,
        pareto=(),
        quality_name="",
        latency_name="",
        quality_bar=None,
        losses=(),
        gates=tuple(Gate(subject, record) for subject, record in manifest.all_gates()),
        gallery=(),
        failures=(),
        machine=detect_machine() if measured is None else measured.machine,
        commands=commands,
        credits=(f"Licence of the bundle: {manifest.licence}.",),
    )
