"""`edgeclip cache`: compute the teacher's embeddings once, before distilling."""

import argparse
from pathlib import Path

from edgeclip.compress.cli.options import add_data, add_teacher, load_source, load_teacher, max_bad
from edgeclip.compress.data.augmentation import Augmentation
from edgeclip.compress.processes import is_helper, processes, silence_helpers
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.runtime.cli.options import Targets, zero_or_more
from edgeclip.runtime.inputs.find_images import add_max_bad_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_teacher(parser)
    add_data(parser, count=32_768)
    parser.add_argument("--views", type=int, default=1, help="augmented views of each picture")
    parser.add_argument("--seed", type=zero_or_more, default=0, help="seed of the augmentation")
    add_max_bad_option(parser)
    parser.add_argument(
        "--workers",
        type=zero_or_more,
        help="processes that read pictures (default: 1, with a GPU up to 8)",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the cache")


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets() if is_helper() else Targets(shared=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Fill the cache; a run that was stopped goes on where it was."""
    silence_helpers()
    teacher = load_teacher(args)
    source = load_source(args, teacher, split="train")
    cache: TeacherCache = build_cache(
        teacher,
        source,
        args.out,
        views=args.views,
        augmentation=Augmentation(seed=args.seed),
        max_bad=max_bad(args),
        workers=args.workers,
    )
    settings = cache.settings
    if processes().is_first:
        count = settings.count - len(cache.unreadable)
        print(f"{count} pictures in {settings.views} views are in {args.out}")
    return 0
