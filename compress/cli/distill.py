"""`edgeclip distill`: train a student in the teacher's embedding space."""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path

from edgeclip.compress.cli.options import (
    add_data,
    add_teacher,
    load_source,
    load_teacher,
    max_bad,
    refuse_teacher_as_output,
)
from edgeclip.compress.data.sampling import MOST_HELD_OUT, Sampling
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import MARKER
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.distill import distill, parts_of
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.bundle.files import check_target, require_space
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.inputs.find_images import add_max_bad_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    shape = StudentShape()
    add_teacher(parser)
    add_data(parser, count=32_768)
    parser.add_argument("--out", type=Path, required=True, help="directory of the student")
    parser.add_argument(
        "--run", type=Path, help="directory of checkpoints and log (default: OUT-run)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="directory of the teacher cache, made if missing (default: RUN/cache)",
    )
    parser.add_argument(
        "--views",
        type=int,
        help="augmented views of each picture (default: those of an existing cache, else 1)",
    )
    parser.add_argument(
        "--family",
        choices=("inherited", "convolutional"),
        default=shape.family,
        help="the image tower: a smaller copy of the teacher's, or a ConvNeXt (default: "
        f"{shape.family})",
    )
    for name in ("image-heads", "image-layers", "text-heads", "text-layers"):
        tower, what = name.split("-")
        default = getattr(shape, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            help=f"{what} of the {tower} tower (default: half of the teacher's)",
        )
    for name, what in (("conv-widths", "channels"), ("conv-depths", "blocks")):
        default = getattr(shape, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            default=default,
            help=f"{what} of each ConvNeXt stage (default: {' '.join(map(str, default))})",
        )
    add_max_bad_option(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        help="may be raised for a run that has ended: its learning rate then goes on as in a run "
        "of so many steps (default: 2000)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: 0.001")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="pictures that are not trained on, but tell whether student and teacher agree; the "
        "student is kept as it was when they agreed best (default: a tenth, at most "
        f"{MOST_HELD_OUT})",
    )
    for name, weight in asdict(LossWeights()).items():
        parser.add_argument(
            f"--{name}",
            type=float,
            default=weight,
            help=f"weight of this loss (default: {weight:g})",
        )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    if not args.out.name:  # refused below
        return Targets()
    folder = _run_folder(args)
    cache = args.cache or folder / "cache"
    return Targets(directories=(args.out,), folders=(folder,), shared=(cache,))


def _run_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.run or args.out.with_name(args.out.name + "-run")
    return folder


def run(args: argparse.Namespace) -> int:
    """Cache, distil and save; a run that was stopped goes on where it was."""
    refuse_teacher_as_output(args)
    check_target(args.out, replace=True, marker=MARKER)
    teacher = load_teacher(args)
    source = load_source(args, teacher, split="train")
    # Refuses a number before the teacher's work.
    Sampling(parts_of(source), held_out=args.held_out)
    folder = _run_folder(args)
    weights, settings = _weights(args), _settings(args)
    shape = StudentShape(
        family=args.family,
        image_heads=args.image_heads,
        image_layers=args.image_layers,
        text_heads=args.text_heads,
        text_layers=args.text_layers,
        conv_widths=tuple(args.conv_widths),
        conv_depths=tuple(args.conv_depths),
    )
    if not source.has_captions:
        print(f"{source.name}: no captions, so the teacher's text tower is kept as it is")
        shape = replace(shape, whole_text=True)
    student = new_student(teacher, shape, seed=args.seed).to(teacher.device)
    require_space(args.out, student.weight_bytes)
    cache = build_cache(
        teacher, source, args.cache or folder / "cache", views=args.views, max_bad=max_bad(args)
    )
    best = distill(
        student,
        cache,
        source,
        loss_weights=weights,
        settings=settings,
        out=folder,
        held_out=args.held_out,
        max_bad=max_bad(args),
    )
    student.save(args.out)
    if best is not None:
        print(
            f"held-out pictures: {best.validation.says} at step {best.step} of {settings.steps}, "
            "which is kept"
        )
    print(f"student written to {args.out}; log and checkpoints in {folder}")
    return 0


def _weights(args: argparse.Namespace) -> LossWeights:
    return LossWeights(**{field.name: getattr(args, field.name) for field in fields(LossWeights)})


def _settings(args: argparse.Namespace) -> TrainSettings:
    return TrainSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
