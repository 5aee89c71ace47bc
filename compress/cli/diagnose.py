"""`edgeclip diagnose`: tell what a student lost of its teacher, where, and what to try next."""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.built_in import model_source
from edgeclip.compress.cli.options import (
    add_data,
    add_teacher,
    load_teacher,
    max_bad,
)
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import (
    EMOJI,
    EmojiSource,
    FolderSource,
    Source,
    readable,
    subset,
)
from edgeclip.compress.diagnose.diagnose import Inputs, diagnose
from edgeclip.compress.diagnose.diagnosis import (
    DiagnosedModel,
    Diagnosis,
    headline,
    not_compared,
)
from edgeclip.compress.diagnose.groups import find_groups, taken
from edgeclip.compress.diagnose.page import write_diagnosis
from edgeclip.compress.diagnose.similarity import LEAST_ITEMS
from edgeclip.compress.processes import processes
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.profiles.report.write_page import check_page_packages
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_directory, check_target
from edgeclip.runtime.cli.options import Targets, add_device_option, positive, zero_or_more
from edgeclip.runtime.console import columns, percent, percent_interval
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import add_max_bad_option
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import usable_precisions

_MARKER, _PAGE = "diagnosis.json", "diagnosis.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_teacher(parser)
    parser.add_argument("--student", help="directory or hub id of the student")
    parser.add_argument(
        "--bundle", type=Path, help="directory of a bundle, each precision of which is looked at"
    )
    add_device_option(parser)
    add_data(parser, count=1000)
    add_max_bad_option(parser)
    parser.add_argument(
        "--most",
        type=positive,
        default=1000,
        metavar="N",
        help="of other data at most so many pictures are taken, drawn by chance (default: 1000)",
    )
    parser.add_argument(
        "--group-by",
        action="append",
        default=[],
        metavar="NAME",
        help="compare groups of pictures: of scenes background, objects or layout; of a folder "
        "folder, or a column of a table (default: all that are known without a table)",
    )
    parser.add_argument(
        "--group-table", type=Path, help="the table (default: that of the captions)"
    )
    parser.add_argument(
        "--outside",
        type=Path,
        help="folder of pictures that no caption is about (default: for the built-in scenes those "
        "of emoji never shown, else drawn discs)",
    )
    parser.add_argument("--seed", type=zero_or_more, default=0, help="of every draw (default: 0)")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"directory to write: {_PAGE} and {_MARKER}"
    )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Measure, find, write and tell."""
    if args.student is None and args.bundle is None:
        raise ConfigError("there is nothing to diagnose: give --student, --bundle or both")
    check_page_packages()
    check_target(args.out, replace=True, marker=_MARKER)
    encoders = _encoders(args)
    teacher = load_teacher(args)
    student = None
    if args.student is not None:
        student = DualEncoder.load(model_source(args.student)).to(processes().device)
    models = [teacher] if student is None else [teacher, student]
    specs = [model.image_spec for model in models]
    size = max(spec.size for spec in (*specs, *(own.spec.image for own in encoders.values())))
    source = open_source(
        args.data or [EMOJI],
        split="test",
        count=args.count,
        size=size,
        strict=args.strict,
        max_bad=max_bad(args),
    )
    rows, left_out = _rows(source, args)
    groups = taken(find_groups(source, args.group_by, args.group_table), rows)
    few = source if len(rows) == len(source) else subset(source, rows, name=source.name)
    inputs = Inputs(
        teacher=teacher,
        student=student,
        encoders=encoders,
        source=few,
        groups=groups,
        outside=_outside(args, source, size),
        left_out=left_out,
        seed=args.seed,
    )
    diagnosis, looks = diagnose(inputs)
    with atomic_directory(args.out, replace=True, marker=_MARKER) as out:
        diagnosis.save(out / _MARKER)
        write_diagnosis(diagnosis, looks, args.command, out / _PAGE)
    print(_told(diagnosis))
    print(f"figures and page are in {args.out}; look at {args.out / _PAGE}")
    return 0


def _encoders(args: argparse.Namespace) -> dict[str, Encoder]:
    """Open the bundle in each precision that both towers have and the device allows."""
    if args.bundle is None:
        return {}
    device = load_device(args.device)
    bundle = Bundle.open(args.bundle)
    if not bundle.manifest.has("text"):
        raise ConfigError(f"{args.bundle} has no text tower, and no caption can be embedded")
    both = [usable_precisions(bundle.manifest.tower(tower), device) for tower in ("image", "text")]
    names = [precision for precision in both[0] if precision in both[1]]
    if not names:
        raise ConfigError(
            f"no precision of both towers of {args.bundle} runs on {device.name}: choose another "
            "--device"
        )
    return {precision: Encoder(bundle, device, precision) for precision in names}


def _rows(source: Source, args: argparse.Namespace) -> tuple[NDArray[np.int64], str]:
    """Return the pictures that have a caption, `--most` of them, and what is left out in words."""
    if isinstance(source, EmojiSource):
        rows = np.arange(len(source))
    else:
        rows = np.array([at for at in range(len(source)) if source.captions(at)], np.int64)
    without = len(source) - len(rows)
    told = [f"{without} pictures have no caption"] if without else []
    if len(rows) > args.most and not isinstance(source, EmojiSource):
        told.append(f"{args.most} of {len(rows)} were drawn by chance")
        rng = np.random.default_rng(args.seed)
        rows = np.sort(rng.choice(rows, args.most, replace=False))
    if len(rows) < LEAST_ITEMS:
        raise ConfigError(
            f"{source.name}: {len(rows)} pictures with captions are too few to tell anything: give "
            f"at least {LEAST_ITEMS}, and some 1000 to judge groups"
        )
    return rows.astype(np.int64), "; ".join(told)


def _outside(args: argparse.Namespace, source: Source, size: int) -> Source | None:
    """Open the pictures of `--outside`; those of unseen emoji for the built-in scenes."""
    if args.outside is not None:
        folder = FolderSource(args.outside, divide=False, min_side=size, strict=args.strict)
        found = readable(folder, max_bad(args))
        if len(found) <= args.most:
            return found
        drawn = np.random.default_rng(args.seed).choice(len(found), args.most, replace=False)
        return subset(found, np.sort(drawn), name=f"{args.most} of {found.name}")
    if isinstance(source, EmojiSource):
        count = len(source) // 2
        return EmojiSource("unseen", count, size=size, distinct=True, drawing=source.drawing)
    return None


def _told(found: Diagnosis) -> str:
    rows: list[tuple[str, ...]] = [("", "R@1", "", "kept", "", "cosine", "ECE", "outside")]
    rows += [_row(model) for model in found.models]
    lines = [f"{found.pictures} pictures, {found.captions} captions of {found.data}"]
    lines += [f"left out: {found.left_out}"] if found.left_out else []
    lines += [*not_compared(found), columns(rows)]
    for item in found.findings:
        lines += ["", f"{item.kind}, {item.subject}: {item.title}"]
        lines += [f"  {text}" for text in (*item.evidence, item.advice)]
    if all(item.kind == "too few pictures" for item in found.findings):
        told = headline(found)
        lines += ["", told[0].lower() + told[1:]]
    return "\n".join(lines)


def _row(model: DiagnosedModel) -> tuple[str, ...]:
    def share(value: Interval | None) -> tuple[str, str]:
        return ("", "") if value is None else (percent(value.value), percent_interval(value))

    agreements = [own.cosine for own in (model.image, model.text) if own is not None]
    cosines = " ".join(f"{own.value:.3f}" for own in agreements if own is not None)
    outside = "" if model.outside is None else f"{model.outside.value:.3f}"
    ece = percent(model.calibration.error)
    return (model.name, *share(model.r1), *share(model.kept), cosines, ece, outside)
