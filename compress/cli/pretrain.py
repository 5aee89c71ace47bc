"""`edgeclip pretrain`: train the built-in teacher from scratch."""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from edgeclip.compress.teachers.dual_encoder import MARKER, keep_others
from edgeclip.compress.train.pretrain import TeacherShape, pretrain
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.bundle.files import atomic_directory, check_target
from edgeclip.runtime.cli.options import Targets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", type=Path, required=True, help="directory of the teacher")
    parser.add_argument(
        "--run", type=Path, help="directory of checkpoints and log (default: runs/NAME-run)"
    )
    parser.add_argument("--steps", type=int, default=3200, help="default: 3200")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="default: 0.0008")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(TeacherShape):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=int, default=field.default, help=f"default: {field.default}")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,), folders=(_run_folder(args),))


def _run_folder(args: argparse.Namespace) -> Path:
    # Not beside the teacher: that may be inside a package.
    folder: Path = args.run or Path("runs", f"{args.out.resolve().name}-run")
    return folder


def run(args: argparse.Namespace) -> int:
    """Train, then write the teacher with fp16 weights and the log of its training."""
    check_target(args.out, replace=True, marker=MARKER)
    shape = TeacherShape(
        **{field.name: getattr(args, field.name) for field in fields(TeacherShape)}
    )
    settings = TrainSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        optimizer="adamw",
        learning_rate=args.learning_rate,
        warmup_steps=150,
        seed=args.seed,
    )
    folder = _run_folder(args)
    teacher = pretrain(shape, settings, folder)
    with atomic_directory(args.out, replace=True, marker=MARKER) as written:
        teacher.save_into(written, dtype=torch.float16)
        keep_others(args.out, written)
        (written / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes())
    print(f"teacher written to {args.out}; checkpoints in {folder}")
    return 0
