"""`edgeclip export`: turn a student into a verified bundle for a device."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import open_source
from edgeclip.compress.verb_options import add_teacher, load_teacher
from edgeclip.export.build_bundle import BuiltBundle, build_bundle
from edgeclip.export.bundle_plan import BundlePlan
from edgeclip.export.choose import CHOOSING
from edgeclip.export.embed_pairs import torch_embedder
from edgeclip.export.list_targets import targets_table
from edgeclip.export.write_bundle import Origin
from edgeclip.profiles.device import THIS_MACHINE, load_device
from edgeclip.runtime.embeddings import check_space
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.labels import LabelSet, bake_labels, split_names
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.verb_options import positive

_HEAD = "head"  # the label set of the label head


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("student", nargs="?", help="directory or hub id of the student")
    add_teacher(parser)
    parser.add_argument("--out", type=Path, help="the bundle's directory")
    parser.add_argument(
        "--list", action="store_true", help="list the devices, and what can be done for each here"
    )
    parser.add_argument(
        "--data",
        default="emoji",
        help="emoji, or a folder of pictures with captions, with the subfolders test and "
        "calibration if they are to differ (default: emoji)",
    )
    parser.add_argument(
        "--device",
        default=THIS_MACHINE,
        help=f"name of a device, or its YAML file (default: {THIS_MACHINE})",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=get_args(Precision),
        help="refuse to write a bundle without these (default: what the device allows and "
        "is inside its gates; fp32 is always there)",
    )
    parser.add_argument("--test-count", type=positive, default=1000, help="of emoji scenes")
    parser.add_argument("--calibration-count", type=positive, default=256, help="of emoji scenes")
    parser.add_argument(
        "--label-head",
        metavar="NAMES",
        help="labels, separated by commas, that the image tower itself shall tell apart; the "
        "teacher embeds them",
    )
    parser.add_argument(
        "--patch-features",
        action="store_true",
        help="let the image tower also give the last hidden state of each patch",
    )
    parser.add_argument("--name", help="what to call the model (default: the name of --out)")
    parser.add_argument("--licence", default="unknown", help="of the weights, as SPDX identifier")
    parser.add_argument("--replace", action="store_true", help="replace a bundle that is there")


def run(args: argparse.Namespace) -> int:
    """Build the bundle, then print every gate and the verdict."""
    if args.list:
        print(targets_table())
        return 0
    if args.student is None or args.out is None:
        raise InputError("name a student and --out, the bundle's directory (or ask for --list)")
    plan = _plan(args)
    built = build_bundle(plan, args.out, replace=args.replace, progress=_say)
    print(gates_table(built))
    print(verdict(built))
    return 0


def gates_table(built: BuiltBundle) -> str:
    """One line for each gate: what it is about, value with interval, bound, outcome."""
    rows = [("what", "gate", "value", "95% interval", "bound", "")]
    for item in built.judged:
        gate = item.record
        rows.append(
            (
                item.subject,
                gate.name,
                f"{gate.value:.5f}",
                f"{gate.low:.5f} to {gate.high:.5f}",
                f"{gate.direction} {gate.bound:g} {gate.unit}",
                "pass" if gate.passed else "miss",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def verdict(built: BuiltBundle) -> str:
    """What was left out, what each tower ships in, and where the bundle is."""
    lines = [f"left out: {reason}" for reason in built.left_out]
    lines += [f"{tower} tower: {item}" for tower, item in built.tuned if item.places]
    lines += [f"{item.tower} tower: {item.precision} ({item.why})" for item in built.choices]
    return "\n".join([*lines, f"bundle written to {built.bundle.path}"])


def _plan(args: argparse.Namespace) -> BundlePlan:
    device = load_device(args.device)
    student = DualEncoder.load(args.student)
    teacher, size = load_teacher(args), student.image_spec.size
    check_space(teacher.space, student.space, f"the student {args.student}")
    return BundlePlan(
        student=student,
        space=teacher.space,
        calibration=open_source(
            args.data, split="calibration", count=args.calibration_count, size=size
        ),
        test=open_source(args.data, split="test", count=args.test_count, size=size),
        device=device,
        origin=Origin(
            name=args.name or args.out.name,
            teacher=args.teacher,
            student=args.student,
            command=args.command,
            licence=args.licence,
        ),
        precisions=args.precisions,
        labels={} if args.label_head is None else {_HEAD: _bake(teacher, args.label_head)},
        label_head=None if args.label_head is None else _HEAD,
        patch_features=args.patch_features,
        workload=CHOOSING if args.device == THIS_MACHINE else None,
    )


def _bake(teacher: DualEncoder, names: str) -> LabelSet:
    tokenizer, embed = teacher.text_tokenizer, torch_embedder(teacher, "text")
    return bake_labels(
        split_names(names),
        DEFAULT_TEMPLATES,
        lambda texts: embed(tokenizer.encode(texts)),
        teacher.space,
    )


def _say(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)
