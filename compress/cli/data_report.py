"""`edgeclip data-report`: judge pictures and captions before they are trained on.

Writes a page with the worst of them, a list of those worth keeping, and all figures.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.built_in import BUILT_IN
from edgeclip.compress.cli.options import add_data, add_teacher, load_source, load_teacher
from edgeclip.compress.data.data_report import (
    CaptionAgreement,
    Judgement,
    KeepRules,
    agreement,
    caption_statistics,
    judge,
)
from edgeclip.compress.data.data_report_page import ReportedData, write_data_report
from edgeclip.compress.data.keep_list import write_keep_list
from edgeclip.compress.data.near_duplicates import (
    NearDuplicates,
    copies_cosine,
    near_duplicates,
)
from edgeclip.compress.data.picture_groups import read_groups
from edgeclip.compress.data.picture_statistics import (
    MEASURES,
    PictureStatistics,
    measure_source,
)
from edgeclip.compress.data.sources import EMOJI, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, fast_inference
from edgeclip.profiles.report.write_page import check_page_packages
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import atomic_directory, check_target
from edgeclip.runtime.cli.options import Targets, positive
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import MaxBad

_MARKER = "figures.npz"
_PAGE, _KEEP = "report.html", "keep.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    rules = KeepRules()
    add_teacher(parser)
    add_data(parser, count=32_768)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help=f"directory to write: {_PAGE}, {_KEEP} (for `distill --keep`) and {_MARKER}",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="directory of the teacher cache, which `distill --cache` takes too, made if missing "
        "(default: OUT-cache)",
    )
    parser.add_argument(
        "--group-by", metavar="COLUMN", help="compare groups of pictures by this column of a table"
    )
    parser.add_argument(
        "--group-table",
        type=Path,
        help="the table, CSV or JSON lines, one of whose columns names the pictures (default: that "
        "of the captions)",
    )
    parser.add_argument(
        "--duplicate-cosine",
        type=float,
        help="two pictures are nearly the same if the teacher's embeddings of them have at least "
        "this cosine; above 1 for none (default: what 95%% of pictures have to a copy of three "
        "quarters of their size, as a JPEG of quality 75, between 0.9 and 0.9999)",
    )
    parser.add_argument(
        "--compare-all",
        type=positive,
        default=100_000,
        metavar="N",
        help="up to so many pictures every two are compared, which takes some minutes for 100000 "
        "on two cores; of more only those in the same of sqrt(N) cells, and the report says what "
        "share of duplicates that found (default: 100000)",
    )
    parser.add_argument(
        "--agreement-deviations",
        type=float,
        default=rules.agreement_deviations,
        metavar="Z",
        help="leave out pairs whose agreement lies so many robust standard deviations below the "
        f"median, 0 for none (default: {rules.agreement_deviations:g})",
    )
    for name, kind, what in (
        ("min-side", int, "pictures whose shorter side has fewer pixels"),
        ("max-aspect", float, "pictures whose longer side is more than so many times the shorter"),
        ("min-sharpness", float, "pictures with a smaller variance of the Laplacian"),
        ("min-contrast", float, "pictures with a smaller RMS contrast, from 0 to 0.5"),
        ("max-noise", float, "pictures with more noise, in levels of 255"),
        ("min-brightness", float, "darker pictures, from 0 to 1"),
        ("max-brightness", float, "brighter pictures, from 0 to 1"),
        ("max-repeated", int, "pictures with a caption that more than so many pictures have"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, metavar="X", help=f"leave out {what} (default: none)"
        )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.out,), shared=(_cache_folder(args),))


def _cache_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.cache or args.out.with_name(args.out.name + "-cache")
    return folder


def run(args: argparse.Namespace) -> int:
    """Measure, embed, judge and write; a run that was stopped goes on where it was."""
    check_page_packages()
    rules = _rules(args)
    check_target(args.out, replace=True, marker=_MARKER)
    teacher = load_teacher(args)
    source = load_source(args, teacher, split="train")
    if not len(source):
        raise ConfigError("a report needs pictures: --count must be above 0")
    groups = read_groups(source, args.group_table, args.group_by) if args.group_by else None
    folder = _cache_folder(args)
    statistics = _measured(source, teacher, folder)
    seen = _teacher_sees(teacher, source, folder)
    statistics.readable[np.setdiff1d(np.arange(len(source)), seen.rows)] = False
    captions, agreed = None, None
    if source.has_captions:
        tokenizer = teacher.text_tokenizer
        captions = caption_statistics(source, tokenizer.token_counts, tokenizer.spec.context_length)
        agreed = agreement(seen.cache, seen.rows, captions, len(source))
    threshold, threshold_from = _threshold(args, teacher, source, seen)

    def compare(rows: NDArray[np.int64]) -> NearDuplicates:
        return _compared(seen, statistics, rows, threshold, args.compare_all, teacher)

    judgement = judge(statistics, captions, agreed, rules, compare)
    if not len(judgement.kept):
        told = _told(judgement, len(source)).replace("\n", ";")
        raise InputError(f"the rules leave nothing to train on: {told}; ask for less")
    name = "the built-in teacher" if args.teacher == BUILT_IN else str(args.teacher)
    with atomic_directory(args.out, replace=True, marker=_MARKER) as out:
        data = ReportedData(
            source=source,
            side=teacher.spec.image.size,
            statistics=statistics,
            captions=captions,
            agreed=agreed,
            judgement=judgement,
            rules=rules,
            threshold=threshold,
            threshold_from=threshold_from,
            groups=groups,
            command=args.command,
            next_command=_next_command(args),
            teacher=name,
        )
        write_data_report(data, out / _PAGE)
        kept = statistics.content[judgement.kept]
        write_keep_list(out / _KEEP, kept, _comments(args, source, judgement))
        _write_figures(out / _MARKER, statistics, agreed, judgement)
    print(_told(judgement, len(source)))
    print(f"page, list and figures are in {args.out}; look at {args.out / _PAGE}")
    return 0


def _rules(args: argparse.Namespace) -> KeepRules:
    given = {field.name: getattr(args, field.name) for field in fields(KeepRules)}
    given["agreement_deviations"] = args.agreement_deviations or None
    return KeepRules(**given)


def _measured(source: Source, teacher: DualEncoder, folder: Path) -> PictureStatistics:
    try:
        found = measure_source(source, teacher.spec.image, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what was measured is kept in {folder}, so run it again to go on"
        ) from None
    if not found.readable.any():
        reason = next(iter(found.reasons.values()))
        raise InputError(f"none of {len(source)} images could be read; the first: {reason}")
    return found


@dataclass(frozen=True, slots=True)
class _Seen:
    """The cache of the teacher's embeddings, and the pictures that have some: int64."""

    cache: TeacherCache
    rows: NDArray[np.int64]


def _teacher_sees(teacher: DualEncoder, source: Source, folder: Path) -> _Seen:
    """Embed all pairs; of a cache with several views the unchanged one is taken."""
    cache = build_cache(teacher, source, folder, max_bad=MaxBad(share=1.0, count=0))
    rows = np.setdiff1d(np.arange(len(source)), np.array(cache.unreadable, np.int64))
    return _Seen(cache, rows)


def _threshold(
    args: argparse.Namespace, teacher: DualEncoder, source: Source, seen: _Seen
) -> tuple[float, str]:
    """Return the least cosine of near duplicates, and where it comes from."""
    if args.duplicate_cosine is not None:
        return args.duplicate_cosine, "as --duplicate-cosine says"

    def embed(pictures: Sequence[Image.Image]) -> FloatArray:
        with fast_inference(teacher):
            found: FloatArray = teacher.embed_image(teacher.preprocess(pictures)).cpu().numpy()
        return found

    cosine = copies_cosine(source, seen.rows.tolist(), embed, side=teacher.spec.image.size)
    return cosine, (
        "95% of pictures are at least so alike to a copy of three quarters of their size (but no "
        "smaller than the teacher sees), as a JPEG of quality 75"
    )


def _compared(
    seen: _Seen,
    statistics: PictureStatistics,
    rows: NDArray[np.int64],
    threshold: float,
    most_exact: int,
    teacher: DualEncoder,
) -> NearDuplicates:
    """Find near duplicates among pictures by their index in the source."""
    count, thumbnails = len(statistics), statistics.thumbnails
    if len(seen.rows) < count:
        thumbnails = thumbnails[seen.rows]
    place = np.full(count, -1, np.int64)
    place[seen.rows] = np.arange(len(seen.rows))
    found = near_duplicates(
        seen.cache.image(seen.rows.tolist()),
        thumbnails,
        place[rows],
        threshold,
        most_exact=most_exact,
        device=teacher.device,
    )
    same_as, cosine = np.arange(count), np.ones(count, np.float32)
    same_as[seen.rows], cosine[seen.rows] = seen.rows[found.same_as], found.cosine
    return NearDuplicates(
        same_as=same_as, cosine=cosine, compared=found.compared, found=found.found
    )


def _next_command(args: argparse.Namespace) -> str:
    words = ["edgeclip", "distill"]
    words += [] if args.teacher == BUILT_IN else ["--teacher", str(args.teacher)]
    data = args.data or [EMOJI]
    words += [word for item in data if item != EMOJI for word in ("--data", item)]
    words += ["--data", EMOJI] if EMOJI in data and len(data) > 1 else []
    words += ["--count", str(args.count)] if EMOJI in data else []
    words += ["--cache", str(_cache_folder(args)), "--keep", str(args.out / _KEEP)]
    return shlex.join([*words, "--out", "student"])


def _comments(args: argparse.Namespace, source: Source, judgement: Judgement) -> list[str]:
    told = [
        f"{len(judgement.those(name))} {name}"
        for name in judgement.reasons
        if len(judgement.those(name))
    ]
    return [
        f"{len(judgement.kept)} of {source.name} are kept, by their content",
        f"left out: {', '.join(told) or 'none'}",
        f"made by: {args.command}",
    ]


def _told(judgement: Judgement, count: int) -> str:
    lines = [f"{len(judgement.kept)} of {count} pictures are kept"]
    for name in judgement.reasons:
        number = len(judgement.those(name))
        lines += [f"  {number} left out: {name}"] if number else []
    return "\n".join(lines)


def _write_figures(
    path: Path,
    statistics: PictureStatistics,
    agreed: CaptionAgreement | None,
    judgement: Judgement,
) -> None:
    """Write a column of each figure, a row a picture; no pickle is needed to read it."""
    names = np.array([*judgement.reasons, ""])
    columns: dict[str, Any] = {
        "content": statistics.content,
        **{name: statistics.column(name) for name in ("short_side", "long_side", *MEASURES)},
        "agreement": np.full(len(statistics), np.nan, np.float32) if agreed is None else agreed.own,
        "same_as": judgement.same_as,
        "left_out": names[judgement.reason],
    }
    np.savez_compressed(path, **columns)
