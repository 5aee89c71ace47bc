"""`edgeclip report`: measurements, or a bundle, as one HTML page and as Markdown.

Measurement files (`edgeclip profile --out`) become one page with all runs side by side. A bundle
becomes a page of its manifest, with measurements if they are given; `edgeclip demo` writes a
fuller one, with training curves, quality and a gallery.
"""

import argparse
from pathlib import Path

from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.report.bundle_report import bundle_page, bundle_report
from edgeclip.profiles.report.profile_data import load_runs
from edgeclip.profiles.report.profile_quality import quality_of_bundle
from edgeclip.profiles.report.profile_report import (
    advice_of,
    profile_summary_page,
    write_profile_report,
)
from edgeclip.profiles.report.write_page import markdown_of, write_html
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "what",
        type=Path,
        nargs="+",
        metavar="RUN.json|BUNDLE",
        help="files that `edgeclip profile --out` wrote, or the directory of one bundle",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        help="a bundle that was measured, for its quality beside its latency; may be repeated",
    )
    parser.add_argument(
        "--measurements", type=Path, help="with a bundle: a file of measurements of it"
    )
    parser.add_argument("--out", type=Path, help="the HTML file to write")
    parser.add_argument("--markdown", type=Path, help="the Markdown file to write, of measurements")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out, args.markdown))


def run(args: argparse.Namespace) -> int:
    """Write what was asked for."""
    if any(path.is_dir() for path in args.what):
        return _report_bundle(args)
    if args.measurements is not None:
        raise InputError("--measurements goes with a bundle: give the files themselves instead")
    if args.out is None and args.markdown is None:
        raise InputError("nothing to write: give --out PAGE.html, --markdown PAGE.md, or both")
    runs = load_runs(args.what)
    quality = [one for path in args.bundle for one in quality_of_bundle(Bundle.open(path))]
    advice = advice_of(runs)
    if args.out is not None:
        write_profile_report(runs, args.out, quality=quality, advice=advice)
        print(f"report in {args.out}")
    if args.markdown is not None:
        with atomic_file(args.markdown) as temporary:
            content = markdown_of(profile_summary_page(runs, quality=quality, advice=advice))
            temporary.write_bytes(content.encode("utf-8", "replace"))
        print(f"Markdown in {args.markdown}")
    return 0


def _report_bundle(args: argparse.Namespace) -> int:
    if len(args.what) > 1:
        raise InputError(
            "give one bundle, or files of measurements; the bundle of measurements is --bundle"
        )
    if args.out is None or args.markdown is not None or args.bundle:
        raise InputError("the report of a bundle is one HTML page: give --out, and only --out")
    measured = None if args.measurements is None else MeasurementRun.load(args.measurements)
    write_html(bundle_page(bundle_report(Bundle.open(args.what[0]), measured)), args.out)
    print(f"report in {args.out}")
    return 0
