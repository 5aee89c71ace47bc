"""`edgeclip profile`: measure latency, throughput, memory and energy, reproducibly.

Subjects are the towers of bundles in every precision that the device can run, the whole path
from an image file to its embedding, the same split between device and server, and ONNX files of
others (peers). Their runs are interleaved. The result is one JSON file and, on request, a report
and a verdict against an earlier run.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeclip.profiles.compare.compare_runs import (
    check_same_amounts,
    compare_runs,
    describe_hardware,
    subjects_only_in,
)
from edgeclip.profiles.compare.regression_gate import (
    comparison_markdown,
    comparison_text,
    parse_max_regression,
    regression_gate,
)
from edgeclip.profiles.measure.subject import SplitSpec, SubjectSpec, bundle_parts, bundle_subjects
from edgeclip.profiles.profile_subjects import ProfilePlan, profile_subjects
from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.report.profile_data import NamedRun
from edgeclip.profiles.report.profile_quality import quality_of_bundle
from edgeclip.profiles.report.profile_report import (
    advice_of,
    profile_summary_page,
    write_profile_report,
)
from edgeclip.profiles.report.sections import AdviceNote
from edgeclip.profiles.report.tables import measurement_table, write_parquet
from edgeclip.profiles.report.write_page import markdown_of
from edgeclip.profiles.workload import Workload, load_workload, workload_names
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.cli.options import Targets, add_device_option
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import list_images, readable_images

_log = logging.getLogger(__name__)
_PARTS = ("image", "text", "file")
_REGRESSED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "bundles", nargs="*", metavar="[NAME=]BUNDLE", help="bundles to measure side by side"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="PART:NAME=FILE.onnx",
        help="another ONNX file to measure beside them, such as image:plain=model.onnx",
    )
    parser.add_argument(
        "--peer-axis",
        action="append",
        default=[],
        type=_axis,
        metavar="AXIS=SIZE",
        help="size of a dynamic axis of a --peer other than the batch, such as sequence_length=16",
    )
    parser.add_argument(
        "--workload",
        default="standard",
        help=f"a YAML file, or one of: {', '.join(workload_names())} (default: standard)",
    )
    add_device_option(parser)
    parser.add_argument(
        "--parts",
        help=f"parts of a bundle to run (default: {','.join(_PARTS)}, as far as the bundle has "
        "them; and split, with --plan)",
    )
    parser.add_argument("--pictures", type=Path, help="image files for the parts file and split")
    parser.add_argument(
        "--reference", help="name of the subject that ratios divide by (default: fp32)"
    )
    parser.add_argument(
        "--brief", action="store_true", help="leave out stages, layers and the roofline"
    )
    _add_split(parser)
    _add_gate(parser)
    _add_outputs(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", help="a plan of `edgeclip plan --out`: also runs the part split")
    parser.add_argument("--server", help="address of the server, for --plan")
    parser.add_argument("--cuts", help="directory of `edgeclip cut`, for a plan that cuts")
    parser.add_argument("--token-file", help="the server's token (or $EDGECLIP_TOKEN)")
    parser.add_argument("--fingerprint", help="SHA-256 of the server's certificate")
    parser.add_argument("--ca", help="PEM file of certificates to trust")


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", type=Path, help="an earlier run (--out) to compare with")
    parser.add_argument(
        "--max-regression",
        type=_share,
        help="exit with 1 if a subject is slower by more than this, such as 5%%, with 95%% "
        "confidence",
    )
    parser.add_argument(
        "--undecided-fails",
        action="store_true",
        help="also exit with 1 if the measurements are too noisy to decide",
    )
    parser.add_argument(
        "--other-machine", action="store_true", help="allow an earlier run of another machine"
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    parser.add_argument("--report", type=Path, help="write an HTML page")
    parser.add_argument("--markdown", type=Path, help="write Markdown for a pull request")
    parser.add_argument("--parquet", type=Path, help="write a long table, one row for each figure")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out, args.report, args.markdown, args.parquet))


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the requested files; return 1 if something regressed."""
    _check(args)
    workload, device = load_workload(args.workload), load_device(args.device)
    baseline = _baseline(args, workload)
    bundles = [_bundle(given) for given in args.bundles]
    peers = [_peer(given, device, args.peer_axis) for given in args.peer]
    specs = (*_subjects(args, bundles, device), *peers)
    plan = ProfilePlan(
        specs=specs,
        device=device,
        workload=workload,
        command=args.command,
        reference=_reference(args.reference, specs),
        inside=not args.brief,
    )
    _log.info("measuring %s", ", ".join(spec.title for spec in specs))
    measured = profile_subjects(plan)
    if args.out is not None:
        measured.save(args.out)  # before anything else can go wrong
    print(measurement_table(measured))
    named = NamedRun(name=args.out.stem if args.out else device.name, run=measured)
    notes = advice_of([named])
    for note in notes:
        print(f"\n{note.subject}: {note.title} ({'; '.join(note.evidence)})")
    status, comparison = _compare(args, measured, baseline)
    _write(args, named, notes, [opened for _, opened in bundles], comparison)
    return status


def _baseline(args: argparse.Namespace, workload: Workload) -> MeasurementRun | None:
    """Load the earlier run; refuse one that cannot be compared before minutes are spent."""
    if args.against is None:
        return None
    found = MeasurementRun.load(args.against)
    check_same_amounts(workload, found.workload)
    there, here = describe_hardware(found.machine), describe_hardware(detect_machine())
    if args.max_regression is not None and not args.other_machine and there != here:
        raise InputError(
            f"{args.against} is of another machine ({there}) than this one ({here}): measure it "
            "anew here, or judge the ratios to the yardstick with --other-machine"
        )
    return found


def _check(args: argparse.Namespace) -> None:
    if not (args.bundles or args.peer):
        raise InputError("nothing to measure: give a bundle, or --peer PART:NAME=FILE.onnx")
    if args.max_regression is not None and args.against is None:
        raise InputError("--max-regression needs --against, the run to compare with")
    if args.plan is None and (args.server or args.cuts):
        raise InputError("--server and --cuts go with --plan, which `edgeclip plan --out` writes")
    if args.peer_axis and not args.peer:
        raise InputError("--peer-axis goes with --peer, whose graph has such an axis")


def _bundle(given: str) -> tuple[str, Bundle]:
    """Open [NAME=]BUNDLE; return the name, empty if none was given, and the bundle."""
    name, equals, path = given.partition("=")
    if not equals or "/" in name:
        name, path = "", given
    return name, Bundle.open(path)


def _subjects(
    args: argparse.Namespace, bundles: Sequence[tuple[str, Bundle]], device: DeviceProfile
) -> list[SubjectSpec]:
    asked = None if args.parts is None else args.parts.split(",")
    unknown = sorted(set(asked or ()) - {*_PARTS, "split"})
    if unknown:
        raise InputError(f"there is no part {unknown[0]!r}: choose from {', '.join(_PARTS)}, split")
    pictures = () if args.pictures is None else readable_images(list_images(args.pictures))
    split = _split(args) if args.plan else None
    found = []
    for name, bundle in bundles:
        prefix = name or (bundle.manifest.name if len(bundles) > 1 else "")
        parts = [*(asked or bundle_parts(bundle)), *(["split"] if args.plan else [])]
        each_once = tuple(dict.fromkeys(parts))
        for spec in bundle_subjects(bundle, device, each_once, pictures, split=split):
            found.append(replace(spec, name=f"{prefix} {spec.name}".strip()))
    return found


def _split(args: argparse.Namespace) -> SplitSpec:
    return SplitSpec(
        plan=args.plan,
        server=args.server,
        cuts=args.cuts,
        token_file=args.token_file,
        fingerprint=args.fingerprint,
        ca=args.ca,
    )


def _peer(given: str, device: DeviceProfile, axes: Sequence[tuple[str, int]]) -> SubjectSpec:
    part, colon, rest = given.partition(":")
    name, equals, path = rest.partition("=")
    if not (colon and equals and name and path) or part not in ("image", "text"):
        raise InputError(
            f"--peer {given!r}: write PART:NAME=FILE.onnx, such as image:plain=model.onnx"
        )
    return SubjectSpec(
        name=name,
        part="image" if part == "image" else "text",
        device=device,
        model=path,
        axes=tuple(axes),
    )


def _reference(asked: str | None, specs: Sequence[SubjectSpec]) -> str | None:
    """Return the requested reference; by default the first subject in fp32, if any."""
    if asked is None:
        return next((spec.name for spec in specs if spec.precision == "fp32"), None)
    names = tuple(dict.fromkeys(spec.name for spec in specs))
    if asked not in names:
        raise InputError(f"--reference {asked!r} is no subject: choose from {', '.join(names)}")
    return asked


def _compare(
    args: argparse.Namespace, measured: MeasurementRun, baseline: MeasurementRun | None
) -> tuple[int, str]:
    """Print the comparison; return the exit status and the comparison in Markdown."""
    if baseline is None:
        return 0, ""
    comparisons = compare_runs(measured, baseline)
    verdict = None
    if args.max_regression is not None:
        verdict = regression_gate(
            comparisons,
            args.max_regression,
            allow_difference=args.other_machine,
            not_measured=subjects_only_in(baseline, measured),
        )
    print(f"\n{comparison_text(comparisons, verdict)}")
    failed = verdict is not None and verdict.fails(undecided_fails=args.undecided_fails)
    return (_REGRESSED if failed else 0), comparison_markdown(comparisons, verdict)


def _write(
    args: argparse.Namespace,
    named: NamedRun,
    notes: Sequence[AdviceNote],
    bundles: Sequence[Bundle],
    comparison: str,
) -> None:
    quality = [one for bundle in bundles for one in quality_of_bundle(bundle)]
    if args.report is not None:
        write_profile_report([named], args.report, quality=quality, advice=notes)
    if args.markdown is not None:
        content = markdown_of(profile_summary_page([named], quality=quality, advice=notes))
        with atomic_file(args.markdown) as temporary:
            text = f"{content}\n{comparison}".rstrip() + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.parquet is not None:
        write_parquet([named.run], args.parquet)
    for path in (args.out, args.report, args.markdown, args.parquet):
        if path is not None:
            print(f"written: {path}")


def _axis(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    if not (name and equals and size.isdecimal() and int(size) > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write AXIS=SIZE with a size above 0, such as sequence_length=16"
        )
    return name, int(size)


def _share(text: str) -> float:
    try:
        return parse_max_regression(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
