"""`edgeclip quantize`: find the fastest quantization of a tower that stays inside its gates."""

import argparse
import logging
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from edgeclip.compress.built_in import BUILT_IN
from edgeclip.compress.cli.options import (
    add_pairs_option,
    add_teacher,
    load_teacher,
    max_bad,
    open_split,
)
from edgeclip.compress.data.sources import EMOJI, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.cli.options import TEST_SCENES, add_cluster_option, cluster_by
from edgeclip.export.gates.gates import ACCEPT_OPTION, describe_missed
from edgeclip.export.gates.teacher_agreement import TeacherBounds, judge_agreement
from edgeclip.export.gates.zero_shot import (
    ZeroShotSet,
    bake_labels_with_teacher,
    emoji_zero_shot,
    find_zero_shot,
    read_label_names,
)
from edgeclip.export.graph.embedders import check_captions, source_clusters
from edgeclip.export.graph.graph_io import sha256_graph
from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, open_evaluator
from edgeclip.export.quantizing.quantization_file import (
    FILE_NAME,
    Quantization,
    SearchBasis,
    SearchedGraph,
    TowerQuantization,
    export_searched,
)
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_page import SearchedTower, write_search_page
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import (
    JudgedPairs,
    SearchTask,
    open_calibration,
    search_space,
)
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.cli.options import Targets, positive
from edgeclip.runtime.device.device_profile import THIS_MACHINE, DeviceProfile, load_device
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import add_max_bad_option
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.clusters import Clusters

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("student", help="directory or hub id of the student")
    add_teacher(parser)
    add_pairs_option(parser)
    parser.add_argument(
        "--device",
        default=THIS_MACHINE,
        help="name of a device, or its YAML file; times are only measured on this machine "
        f"(default: {THIS_MACHINE})",
    )
    parser.add_argument(
        "--tower",
        choices=get_args(Tower),
        default="image",
        help="the tower to search (default: image)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help=f"folder for {FILE_NAME} and all measurements; a rerun continues there",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=15.0,
        help="begin nothing new after this time (default: 15)",
    )
    parser.add_argument("--page", type=Path, help="write the result as an HTML page")
    add_max_bad_option(parser)
    add_cluster_option(parser)
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="try dynamic int8 too, whose embeddings depend on what else is in a batch",
    )
    parser.add_argument(
        "--labels",
        metavar="NAMES",
        help="labels, or a text file with one on each line, that pictures are named by: zero-shot "
        "accuracy is then a gate too",
    )
    parser.add_argument(
        ACCEPT_OPTION,
        action="store_true",
        help="choose also what is inside its gates by the measured values, though the test pairs "
        "are too few to show it",
    )
    parser.add_argument(
        "--test-count", type=positive, default=TEST_SCENES, help="number of emoji scenes to test on"
    )
    parser.add_argument(
        "--calibration-count",
        type=positive,
        default=768,
        help="number of emoji scenes to calibrate on",
    )
    parser.add_argument(
        "--ranges",
        type=positive,
        default=256,
        help="how many of the calibration pairs ranges are found on; configs are compared on the "
        "others (default: 256, and at most half)",
    )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(folders=(args.out,), files=(args.page,))


def run(args: argparse.Namespace) -> int:
    """Search, print the table, and write the choice."""
    device = load_device(args.device)
    data = _data(args)
    here = args.device == THIS_MACHINE
    known = _known(args, device, data.ranges, here=here)
    folder = args.out / args.tower
    _say(f"exporting the {args.tower} tower")
    sample = data.ranges if here else None
    exported = export_searched(data.student, args.tower, device, folder, sample=sample)
    task = SearchTask(
        student=data.student,
        graph=exported.graph,
        device=device,
        ranges=data.ranges,
        steering=data.steering,
        test=data.test,
        workload=SEARCH_WORKLOAD if here else None,
    )
    result = _search(task, folder, args, here)
    print(search_table(result))
    found = replace(known, towers={**known.towers, args.tower: _choice(exported, result)})
    found.save(args.out / FILE_NAME)
    print(f"written to {args.out / FILE_NAME}; next: {_export_command(args)}")
    if args.page is not None:
        write_search_page(result, args.page, _about(args, data, here))
        print(f"page: {args.page}")
    return 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Data:
    """The student, and the pairs to calibrate, steer and test on."""

    student: DualEncoder
    ranges: Source
    steering: JudgedPairs
    test: JudgedPairs


def _search(task: SearchTask, folder: Path, args: argparse.Namespace, here: bool) -> SearchResult:
    began = time.monotonic()

    def progress(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        _say(f"[{minutes}:{seconds:02d}] {line}")

    space = search_space(task.device, task.tower, here=here, dynamic=args.dynamic)
    try:
        with open_evaluator(task, folder) as trial:
            return search(
                trial,
                space,
                minutes=args.minutes,
                rank=True,
                accept_undecided=args.accept_undecided,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: what was measured is kept in {folder}, run the same command to go on"
        ) from None


def _data(args: argparse.Namespace) -> _Data:
    student, teacher = DualEncoder.load(args.student), load_teacher(args)
    check_space(teacher.space, student.space, f"the student {args.student}")
    size = student.image_spec.size
    ranges, steering = open_calibration(
        args.data,
        pairs=args.calibration_count,
        ranges=args.ranges,
        size=size,
        strict=args.strict,
        max_bad=max_bad(args),
    )
    test = open_split(args, "test", count=args.test_count, size=size)
    for source in (steering, test):
        check_captions(source, "comparing configs")
    clusters = source_clusters(teacher, test, cluster_by(args))
    _warn_of_export(student, teacher, test, clusters)
    steered, judged = _zero_shot(args, teacher, steering, test, size)
    return _Data(
        student=student,
        ranges=ranges,
        steering=JudgedPairs(pairs=steering, zero_shot=steered),
        test=JudgedPairs(
            pairs=test,
            zero_shot=judged,
            clusters=clusters,
        ),
    )


def _warn_of_export(
    student: DualEncoder, teacher: DualEncoder, test: Source, clusters: Clusters | None
) -> None:
    """Warn before the search of a student that `edgeclip export` will refuse."""
    found = judge_agreement(student, teacher, test, TeacherBounds(), clusters=clusters)
    missed = describe_missed(found.judged, accept_undecided=True)
    if missed:
        _log.warning(
            "the student is not in its teacher's embedding space, so `edgeclip export` will refuse "
            "it without other bounds or --own-space: %s",
            "; ".join(missed),
        )


def _zero_shot(
    args: argparse.Namespace, teacher: DualEncoder, steering: Source, test: Source, size: int
) -> tuple[ZeroShotSet | None, ZeroShotSet | None]:
    """Return the labelled pictures to steer by and to test on, for the image tower."""
    if args.tower != "image":
        return None, None
    if args.labels is not None:
        _, names = read_label_names(args.labels)
        labels = [bake_labels_with_teacher(teacher, names)]
        return find_zero_shot(steering, labels), find_zero_shot(test, labels)
    if args.data == EMOJI:
        return None, emoji_zero_shot(teacher, count=args.test_count, size=size)
    return None, None


def _known(
    args: argparse.Namespace, device: DeviceProfile, found: Source, *, here: bool
) -> Quantization:
    """Return the choices already written to `--out`, such as of the other tower.

    Raises:
        InputError: they are for another device or machine, or on other pairs.
        ConfigError: the file cannot be read.
    """
    path: Path = args.out / FILE_NAME
    basis = SearchBasis.of(
        device, found, pairs=args.calibration_count, ranges=args.ranges, timed=here
    )
    if not path.exists():
        return Quantization(basis=basis, towers={})
    known = Quantization.load(path)
    if known.basis != basis:
        at = "" if known.basis.machine is None else f" timed on {known.basis.machine},"
        raise InputError(
            f"{path} is for {known.basis.device},{at} with ranges on {known.basis.ranges} of "
            f"{known.basis.pairs} calibration pairs: choose the same device and the same data, as "
            "it was, or another --out"
        )
    return known


def _choice(exported: SearchedGraph, result: SearchResult) -> TowerQuantization:
    return TowerQuantization(
        config=result.chosen.config,
        graph=sha256_graph(exported.graph.path),
        passes=exported.passes,
        why=result.why,
    )


def _export_command(args: argparse.Namespace) -> str:
    """Return the command that exports a bundle with the choice."""
    words = ["edgeclip", "export", args.student, "--quantization", str(args.out / FILE_NAME)]
    defaults = {"teacher": BUILT_IN, "data": EMOJI, "device": THIS_MACHINE}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            words += [f"--{name}", getattr(args, name)]
    words += [ACCEPT_OPTION] if args.accept_undecided else []
    words += [] if args.cluster_by is None else ["--cluster-by", args.cluster_by]
    words += [] if args.test_count == TEST_SCENES else ["--test-count", str(args.test_count)]
    return shlex.join([*words, "--out", "bundle"])


def _about(args: argparse.Namespace, data: _Data, here: bool) -> SearchedTower:
    machine = detect_machine()
    return SearchedTower(
        title=f"The {args.tower} tower of {args.student}, for {args.device}",
        command=args.command,
        ranges=data.ranges.name,
        steering=data.steering.pairs.name,
        test=data.test.pairs.name,
        here=f"{machine.cpu}, {machine.cores} cores" if here else None,
    )


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _say(line: str) -> None:
    _log.info("%s", line)
