"""`edgeclip export`: turn a student into a verified bundle for a device."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from edgeclip.compress.built_in import BUILT_IN
from edgeclip.compress.cli.options import (
    add_pairs_option,
    add_teacher,
    load_teacher,
    log_step,
    max_bad,
    open_split,
)
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import EMOJI, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.quantization_aware import finetune_settings
from edgeclip.export.bundle.build_bundle import BuiltBundle, build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.bundle.write_engines import targets_table
from edgeclip.export.cli.options import TEST_SCENES, add_cluster_option, cluster_by
from edgeclip.export.gates.gates import ACCEPT_OPTION
from edgeclip.export.gates.select_precision import SELECTION_WORKLOAD
from edgeclip.export.gates.teacher_agreement import TeacherBounds
from edgeclip.export.gates.zero_shot import (
    bake_labels_with_teacher,
    emoji_zero_shot,
    read_label_names,
)
from edgeclip.export.quantizing.qat_finetune import QatOptions
from edgeclip.export.quantizing.quantization_file import FILE_NAME, Quantization
from edgeclip.export.quantizing.search_task import open_calibration
from edgeclip.runtime.bundle.files import MANIFEST_NAME, check_target
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.bundle.manifest import gates_table
from edgeclip.runtime.cli.options import Targets, add_device_option, positive, zero_or_more
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import add_max_bad_option
from edgeclip.runtime.spec import Precision

_BOUNDS = tuple(asdict(TeacherBounds()))
_NO_TEACHER = "none (it has a space of its own)"
_HEAD = "head"  # the label set of the label head, if it has no other name
_CALIBRATION = 256  # emoji scenes to find ranges on
_TUNING_SCENES = 8192  # to fine-tune on, at most; they are embedded first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("student", nargs="?", help="directory or hub id of the student")
    add_teacher(parser)
    parser.add_argument("--out", type=Path, help="the bundle's directory")
    parser.add_argument(
        "--list",
        action="store_true",
        help="list the devices, and what this machine can do for each",
    )
    add_pairs_option(parser)
    add_device_option(parser)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=get_args(Precision),
        help="refuse to write a bundle without these (default: what the device allows and "
        "is inside its gates; fp32 is always there)",
    )
    parser.add_argument(
        "--test-count",
        type=positive,
        default=TEST_SCENES,
        help=f"number of test pairs, with --data emoji (default: {TEST_SCENES})",
    )
    parser.add_argument(
        "--calibration-count",
        type=positive,
        help=f"number of calibration pairs, with --data emoji (default: {_CALIBRATION}, or that of "
        "--quantization)",
    )
    add_max_bad_option(parser)
    add_cluster_option(parser)
    _add_teacher_bounds(parser)
    _add_int8_options(parser)
    _add_label_options(parser)
    parser.add_argument(
        "--patch-features",
        action="store_true",
        help="let the image tower also output the last hidden state of each patch",
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="leave out the text tower: the device classifies by label sets, and searches by "
        "pictures",
    )
    parser.add_argument("--name", help="name of the model (default: the name of --out)")
    parser.add_argument(
        "--licence",
        help="licence of the weights, as SPDX identifier (default: the teacher's, where it is "
        "known)",
    )
    parser.add_argument(
        ACCEPT_OPTION,
        action="store_true",
        help="ship what is inside its gates by the measured values, though the test pairs are too "
        "few to show it; the bundle records these gates as undecided",
    )
    parser.add_argument(
        "--looks",
        type=positive,
        default=1,
        metavar="N",
        help="how many students, or counts of test pairs, are tried on the same test data until "
        "one is shipped: the intervals then hold for all of them together (default: 1)",
    )
    parser.add_argument("--replace", action="store_true", help="replace an existing bundle")


def _add_teacher_bounds(parser: argparse.ArgumentParser) -> None:
    says = {
        "mean_cosine": "smallest mean cosine of a tower's embeddings of the test pairs to the "
        "teacher's",
        "p1_cosine": "smallest 1st percentile of these cosines",
        "r1_kept": "smallest share of the teacher's R@1 on the test pairs",
    }
    for name, bound in asdict(TeacherBounds()).items():
        parser.add_argument(
            f"--teacher-{name.replace('_', '-')}",
            type=float,
            default=bound,
            metavar="BOUND",
            help=f"{says[name]} (default: {bound:g})",
        )
    parser.add_argument(
        "--own-space",
        action="store_true",
        help="hold the student against no teacher: the bundle gets an embedding space of its own, "
        "which no index or label set of the teacher fits; labels are embedded by the student",
    )


def _add_int8_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantization",
        type=Path,
        metavar="FILE",
        help=f"{FILE_NAME} of `edgeclip quantize`: use the configs found by its search, which must "
        "be of the same student, device and data",
    )
    parser.add_argument(
        "--qat-steps",
        type=zero_or_more,
        default=0,
        metavar="N",
        help="if int8 misses a gate, fine-tune the student for int8 for N steps on the train split "
        "of --data, and try again; a rerun resumes in OUT-qat (default: 0, never)",
    )


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="[NAME=]LABELS",
        help="a label set to embed with the teacher and store in the bundle: labels separated by "
        "commas, or a file with one on each line; may be repeated",
    )
    parser.add_argument(
        "--template",
        action="append",
        help=f"sentence around a label; the embeddings of several are averaged; may be repeated "
        f"(default: {DEFAULT_TEMPLATES[0]!r})",
    )
    parser.add_argument(
        "--label-head",
        metavar="LABELS",
        help="add a classification head for these labels to the image tower: as for --labels, or "
        "the name of one of these sets",
    )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    if args.list or args.out is None:
        return Targets()
    qat = (_qat_folder(args),) if args.qat_steps and args.out.name else ()
    return Targets(directories=(args.out,), folders=qat)


def run(args: argparse.Namespace) -> int:
    """Build the bundle, then print its gates with remarks, and what was built."""
    if args.list:
        print(targets_table())
        return 0
    if args.student is None or args.out is None:
        raise InputError("name a student and --out, the bundle's directory (or ask for --list)")
    check_target(args.out, replace=args.replace, marker=MANIFEST_NAME)
    plan = _plan(args)
    built = build_bundle(plan, args.out, replace=args.replace)
    gates = [(item.subject, item.record) for item in built.judged]
    print(gates_table(gates, built.bundle.manifest.remarks))
    print(describe_build(built))
    return 0


def describe_build(built: BuiltBundle) -> str:
    """List what was left out, the precision of each tower and why, and where the bundle is."""
    lines = [f"left out: {reason}" for reason in built.left_out]
    lines += [f"int8: {built.int8_hint}"] if built.int8_hint else []
    lines += [f"{tower} tower: {item}" for tower, item in built.tried_passes if item.places]
    lines += [f"{item.tower} tower: {item.precision} ({item.why})" for item in built.selected]
    return "\n".join([*lines, f"bundle written to {built.bundle.path}"])


def _plan(args: argparse.Namespace) -> BundlePlan:
    named, head = _labels(args)
    device = load_device(args.device)
    bounds = TeacherBounds(**{name: getattr(args, f"teacher_{name}") for name in _BOUNDS})
    student, teacher = _models(args)
    labeller, size = teacher or student, student.image_spec.size
    templates = tuple(args.template or DEFAULT_TEMPLATES)
    quantization = None if args.quantization is None else Quantization.load(args.quantization)
    plan = BundlePlan(
        student=student,
        calibration=_calibration(args, quantization, size),
        test=open_split(args, "test", count=args.test_count, size=size),
        device=device,
        origin=Origin(
            name=args.name or args.out.name,
            teacher=_NO_TEACHER if teacher is None else args.teacher,
            student=args.student,
            command=args.command,
            licence=args.licence or _licence(student, teacher),
        ),
        teacher=teacher,
        teacher_bounds=bounds,
        precisions=args.precisions,
        labels={
            name: bake_labels_with_teacher(labeller, items, templates)
            for name, items in named.items()
        },
        label_head=head,
        patch_features=args.patch_features,
        text_tower=not args.no_text,
        workload=SELECTION_WORKLOAD if args.device == THIS_MACHINE else None,
        quantization=quantization,
        qat=_qat_options(args, size),
        accept_undecided=args.accept_undecided,
        declared_looks=args.looks,
        cluster_by=cluster_by(args),
    )
    if args.data != EMOJI or len(plan.wanted) == 1:  # fp32 alone is not judged by labels
        return plan
    log_step("embedding the names of emoji")
    return replace(plan, zero_shot=emoji_zero_shot(labeller, count=args.test_count, size=size))


def _licence(student: DualEncoder, teacher: DualEncoder | None) -> str:
    """Return the licence that the weights are under, as far as model cards tell."""
    of_teacher = None if teacher is None else teacher.licence
    return student.licence or of_teacher or "unknown"


def _models(args: argparse.Namespace) -> tuple[DualEncoder, DualEncoder | None]:
    """Load the student and its teacher; no teacher with `--own-space`.

    Raises:
        ConfigError: a model cannot be loaded.
        InputError: a teacher is named as well as `--own-space`.
        SpaceMismatchError: the student was distilled from another teacher.
    """
    student = DualEncoder.load(args.student)
    if args.own_space:
        if args.teacher != BUILT_IN:
            raise InputError("--own-space holds the student against no teacher: leave out one")
        own = DualEncoder(
            student.model, student.image_spec, student.tokenizer, licence=student.licence
        )
        return own.eval(), None
    teacher = load_teacher(args)
    check_space(teacher.space, student.space, f"the student {args.student}")
    return student, teacher


def _calibration(args: argparse.Namespace, quantization: Quantization | None, size: int) -> Source:
    """Open the calibration pairs: after a search, the same pairs as in the search.

    Raises:
        ConfigError: there are too few.
        InputError: no pictures, or another number is asked for than was searched with.
    """
    count = args.calibration_count
    if quantization is None:
        count = count or _CALIBRATION
        return open_split(args, "calibration", count=count, size=size)
    basis = quantization.basis
    if count not in (None, basis.pairs):
        raise InputError(
            f"{args.quantization} was searched with {basis.pairs} calibration pairs: leave out "
            "--calibration-count"
        )
    found, _ = open_calibration(
        args.data,
        pairs=basis.pairs,
        ranges=basis.ranges,
        size=size,
        strict=args.strict,
        max_bad=max_bad(args),
    )
    return found


def _qat_options(args: argparse.Namespace, size: int) -> QatOptions | None:
    """Return the options of the fine-tune for int8; None if it is not allowed.

    Raises:
        ConfigError, InputError: there are no pictures to train on.
    """
    if not args.qat_steps:
        return None
    settings = finetune_settings(args.qat_steps)
    scenes = min(args.qat_steps * settings.batch_size, _TUNING_SCENES)
    return QatOptions(
        source=open_source(args.data, split="train", count=scenes, size=size, strict=args.strict),
        settings=settings,
        folder=_qat_folder(args),
        max_bad=max_bad(args),
    )


def _qat_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.out.with_name(f"{args.out.name}-qat")
    return folder


def _labels(args: argparse.Namespace) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """Return the label sets to make, and the name of the label head's set."""
    named: dict[str, tuple[str, ...]] = {}
    for given in args.labels:
        name, labels = read_label_names(given)
        if name in named:
            raise InputError(f"two label sets are called {name!r}: write NAME=LABELS")
        named[name] = labels
    if args.label_head is None or args.label_head in named:
        return named, args.label_head
    name, labels = read_label_names(args.label_head)
    name = _HEAD if name == "labels" else name
    if name in named:
        raise InputError(f"two label sets are called {name!r}: write NAME=LABELS")
    return {**named, name: labels}, name
