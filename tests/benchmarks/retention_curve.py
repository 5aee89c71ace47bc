"""What students of 50 to 4% of the teacher's parameters keep of its R@1, and what they cost.

All are distilled from one cache of the built-in teacher, with the losses of `edgeclip distill`, and
sizes and settings that no test scene chose. R@1 is the mean of both directions on unseen scenes;
the share that is kept has a paired interval. Latency is that of one picture and one caption, ONNX
in fp32, all students and the teacher in turns. `--work DIR` keeps the runs, so that a stopped one
goes on.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _bars import Bar, Rule, finish, hold, options, say, span
from numpy.typing import NDArray

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.graph.embedders import TOWERS, graph_embedder
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.profiles.measure.interleaved_loads import LoadableTarget, measure_loads
from edgeclip.profiles.measure.interleaved_runs import repeat_rows
from edgeclip.profiles.record.timing_statistics import estimate_paired_ratio
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share


class Size(NamedTuple):
    """A student of so many percent of the teacher's parameters; small ones take more steps."""

    percent: int
    shape: StudentShape
    steps: int


def _shape(
    image_heads: int,
    image_layers: int,
    text_heads: int,
    text_layers: int,
    token_rank: int | None = None,
) -> StudentShape:
    return StudentShape(
        image_heads=image_heads,
        image_layers=image_layers,
        text_heads=text_heads,
        text_layers=text_layers,
        token_rank=token_rank,
    )


SIZES = (
    Size(50, _shape(4, 4, 2, 3), 600),
    Size(33, _shape(3, 4, 2, 3), 600),
    Size(25, _shape(3, 3, 2, 3), 600),
    Size(12, _shape(2, 3, 2, 2, token_rank=32), 1000),
    Size(4, _shape(1, 3, 1, 3, token_rank=24), 1500),
)
BARS: dict[str, Rule] = {
    "kept_at_50_percent": (">=", 0.99, ""),
    "kept_at_33_percent": (">=", 0.985, ""),
    "kept_at_25_percent": (">=", 0.97, ""),
    "kept_at_12_percent": (">=", 0.95, ""),
    "kept_at_4_percent": (">=", 0.90, ""),
    "share_at_*_percent": ("<=", None, ""),  # the percents of its name, rounded
    "time_of_next_larger_at_*_percent": ("<=", 1.0, ""),
}
KEPT_MODELS = ("compress/emoji_teacher",)
TEACHER = "teacher"


class Amount(NamedTuple):
    """How much is trained and measured."""

    scenes: int = 20_480
    most_steps: int = 10_000
    batch_size: int = 128
    test: int = 3000
    workload: str = "standard"


QUICK = Amount(scenes=1024, most_steps=30, batch_size=64, test=300, workload="quick")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A student as it was measured.

    Attributes:
        name: `teacher`, or the size.
        parameters, share: its weights, and as a share of the teacher's.
        r1, image_to_text, text_to_image: R@1, the mean of both directions and each.
        kept: R@1 over the teacher's.
        teacher_time: time of a picture and a caption over the teacher's.
        next_time: the same over the next larger model's.
        milliseconds: of a picture and a caption.
    """

    name: str
    parameters: int
    share: float
    r1: Interval
    image_to_text: Interval
    text_to_image: Interval
    kept: Interval
    teacher_time: Interval
    next_time: Interval
    milliseconds: float

    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        return (
            self.name,
            f"{self.parameters / 1e6:.2f} M",
            f"{self.share:.1%}",
            span(self.r1),
            span(self.image_to_text),
            span(self.text_to_image),
            span(self.kept),
            f"{self.milliseconds:.2f}",
            span(self.teacher_time),
            span(self.next_time),
        )


HEAD = (
    *("model", "weights", "share", "R@1", "image to text", "text to image", "kept"),
    *("ms a pair", "of the teacher's time", "of the next larger one's"),
)


def trained(
    size: Size,
    teacher: DualEncoder,
    cache: TeacherCache,
    source: EmojiSource,
    amount: Amount,
    out: Path,
) -> DualEncoder:
    """Distil a student, or go on where a stopped run was."""
    student = new_student(teacher, size.shape)
    say(f"{size.percent}%: {_count(student) / _count(teacher):.1%} of the teacher's parameters")
    distill(
        student,
        cache,
        source,
        loss_weights=LossWeights(),
        settings=TrainSettings(
            steps=min(size.steps, amount.most_steps), batch_size=amount.batch_size
        ),
        out=out,
    )
    return student


def _count(model: DualEncoder) -> int:
    return sum(weight.numel() for weight in model.parameters())


def hits(model: DualEncoder, test: EmojiSource) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which test pairs are found, from the image and from the text."""
    image, text = (part.numpy() for part in embed_source(model, test))
    ranks = pair_ranks(image, text)
    return ranks.image_to_text <= 1, ranks.text_to_image <= 1


def pair_times(
    folders: dict[str, Path], models: dict[str, DualEncoder], test: EmojiSource, amount: Amount
) -> dict[str, list[NDArray[np.float64]]]:
    """Milliseconds of a picture and a caption of each run, by load, all models in turns."""
    device = load_device("this-machine")
    teacher = models[TEACHER]
    pairs = [test[number] for number in range(16)]
    inputs: dict[Tower, NDArray[Any]] = {
        "image": crop_batch([pair.image for pair in pairs], teacher.image_spec),
        "text": teacher.tokenize([str(pair.caption) for pair in pairs]).numpy(),
    }
    times: dict[str, list[NDArray[np.float64]]] = {}
    for tower in TOWERS:
        targets = [
            _target(name, model, folders[name], tower, inputs[tower], device)
            for name, model in models.items()
        ]
        for item in measure_loads(
            targets, load_workload(amount.workload), part=tower, reference=TEACHER
        ):
            runs = [np.array(load) for load in item.samples_ms]
            before = times.get(item.name)
            times[item.name] = runs if before is None else list(map(_sums, before, runs))
    return times


def _sums(images: NDArray[np.float64], texts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add the times of as many runs as both towers have in a load."""
    count = min(len(images), len(texts))
    return images[:count] + texts[:count]


def _target(
    name: str,
    model: DualEncoder,
    folder: Path,
    tower: Tower,
    rows: NDArray[Any],
    device: DeviceProfile,
) -> LoadableTarget:
    graph = export_towers(model, folder, GraphForm.for_device(device)).graph(tower)
    return LoadableTarget(
        name, lambda: graph_embedder(graph, model.image_spec, device), repeat_rows(rows)
    )


def measured(models: dict[str, DualEncoder], amount: Amount, work: Path) -> list[Row]:
    """Measure the teacher and its students, the largest first."""
    size = models[TEACHER].image_spec.size
    test = EmojiSource("test", amount.test, size=size, distinct=True)
    found = {name: hits(model, test) for name, model in models.items()}
    folders = {name: work / f"onnx-{number}" for number, name in enumerate(models)}
    times = pair_times(folders, models, test, amount)
    whole = _count(models[TEACHER])
    both = {name: np.stack(own).mean(axis=0) for name, own in found.items()}
    rows, larger = [], TEACHER
    for name, model in models.items():
        ratios = (
            estimate_paired_ratio(times[name], times[other]).interval
            if name != other
            else Interval(1, 1, 1)
            for other in (TEACHER, larger)
        )
        teacher_time, next_time = ratios
        rows.append(
            Row(
                name=name,
                parameters=_count(model),
                share=_count(model) / whole,
                r1=estimate_share(both[name]).interval,
                image_to_text=estimate_share(found[name][0]).interval,
                text_to_image=estimate_share(found[name][1]).interval,
                kept=estimate_kept(both[name], both[TEACHER]).interval,
                teacher_time=teacher_time,
                next_time=next_time,
                milliseconds=float(np.median(np.concatenate(times[name]))),
            )
        )
        larger = name
    return rows


def bars(rows: list[Row]) -> list[Bar]:
    """Hold every student to its size."""
    items = []
    for size, row in zip(SIZES, rows[1:], strict=True):
        items += [
            hold(BARS, f"kept_at_{size.percent}_percent", row.kept),
            hold(BARS, f"share_at_{size.percent}_percent", row.share, (size.percent + 0.5) / 100),
            hold(BARS, f"time_of_next_larger_at_{size.percent}_percent", row.next_time),
        ]
    return items


def main() -> int:
    """Distil, measure, print the table and the bars."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, help="keep the cache and the runs here, and go on")
    args = parser.parse_args()
    amount = QUICK if args.quick else Amount()
    teacher = DualEncoder.load(built_in_teacher())
    source = EmojiSource("train", amount.scenes, size=teacher.image_spec.size)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        cache = build_cache(teacher, source, work / "cache")
        models = {TEACHER: teacher}
        for size in SIZES:
            models[f"{size.percent}%"] = trained(
                size, teacher, cache, source, amount, work / f"run-{size.percent}"
            )
        rows = measured(models, amount, work)
    print(columns([HEAD, *(row.cells() for row in rows)]))
    return finish(
        bars(rows), args.out, amount=amount._asdict(), students=[asdict(row) for row in rows]
    )


if __name__ == "__main__":
    sys.exit(main())
