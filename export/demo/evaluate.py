"""Compare student and teacher: retrieval on test scenes, and interleaved latency benchmarks."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, torch_embedder
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.profiles.measure.cold_start import measure_cold_start
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
)
from edgeclip.profiles.measure.open_subject import bundle_targets
from edgeclip.profiles.measure.subject import example_feed, measurable_precisions
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.report.bundle_report import DirectionQuality, ModelQuality, Role
from edgeclip.profiles.report.sections import GalleryEntry, ShownAnswer
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.quality.retrieval import Ranks, pair_ranks, retrieval_of_ranks
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share
from edgeclip.runtime.towers.tower_runner import tower_feed, usable_precisions

TEACHER, STUDENT, SHIPPED = "teacher", "student ", "student as shipped"


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedModel:
    """One model's embeddings of the test pairs, float32 [N, dim], and its retrieval ranks."""

    name: str
    role: Role
    image: FloatArray
    text: FloatArray
    ranks: Ranks

    @property
    def mean_r1(self) -> Interval:
        """R@1, mean of both directions, with its interval over pairs."""
        return estimate_share(self.ranks.hits(1)).interval


def evaluate(
    teacher: DualEncoder, bundle: Bundle, device: DeviceProfile, source: EmojiSource
) -> tuple[EvaluatedModel, ...]:
    """Evaluate the teacher, and the student in each precision of both towers and as it ships.

    If both towers ship in the same precision, the student as it ships is not listed twice;
    `shipped_name` gives its name.
    """
    image, text = (usable_precisions(item, device) for item in bundle.manifest.towers)
    both = [item for item in image if item in text]
    models = [_embed_with_torch(TEACHER, teacher, source)]
    models += [_embed_with_bundle(STUDENT + item, bundle, device, source, item) for item in both]
    if shipped_name(Encoder(bundle, device).precisions) == SHIPPED:
        models.append(_embed_with_bundle(SHIPPED, bundle, device, source))
    return tuple(models)


def shipped_name(shipped: Mapping[Tower, Precision]) -> str:
    """Return the name in the results of `evaluate` of the student in the precisions `shipped`."""
    chosen = set(shipped.values())
    return STUDENT + chosen.pop() if len(chosen) == 1 else SHIPPED


def evaluate_unseen(
    teacher: DualEncoder, bundle: Bundle, device: DeviceProfile, count: int
) -> tuple[EvaluatedModel, EvaluatedModel]:
    """Evaluate teacher and shipped student on scenes of emoji that training never showed."""
    source = EmojiSource("unseen", count, size=teacher.image_spec.size, distinct=True)
    return (
        _embed_with_torch(f"{TEACHER}, unseen emoji", teacher, source),
        _embed_with_bundle(f"{SHIPPED}, unseen emoji", bundle, device, source),
    )


def _embed_with_torch(name: str, model: DualEncoder, source: EmojiSource) -> EvaluatedModel:
    """Embed with the torch model, in full precision."""
    image, text = (part.numpy() for part in embed_source(model, source))
    return EvaluatedModel(name, "teacher", image, text, pair_ranks(image, text))


def _embed_with_bundle(
    name: str,
    bundle: Bundle,
    device: DeviceProfile,
    source: EmojiSource,
    precision: Precision | None = None,
) -> EvaluatedModel:
    """Embed as a device does: with the bundle's towers on the device's engine."""
    encoder = Encoder(bundle, device, precision)
    numbers = range(len(source))
    image = encoder.encode_image([source[number].image for number in numbers])
    text = encoder.encode_text([source.caption(number) for number in numbers])
    return EvaluatedModel(name, "student", image, text, pair_ranks(image, text))


def quality_row(model: EvaluatedModel) -> ModelQuality:
    """Return the model's row for the report."""
    metrics = retrieval_of_ranks(model.ranks)
    rows = []
    for found, ranks in (
        (metrics.image_to_text, model.ranks.image_to_text),
        (metrics.text_to_image, model.ranks.text_to_image),
    ):
        rows.append(
            DirectionQuality(
                r1=estimate_share(ranks <= 1).interval,
                r5=found.r5,
                r10=found.r10,
                median_rank=found.median_rank,
                mean_rank=found.mean_rank,
            )
        )
    return ModelQuality(
        name=model.name, role=model.role, image_to_text=rows[0], text_to_image=rows[1]
    )


def gallery(
    source: EmojiSource, teacher: EvaluatedModel, student: EvaluatedModel, numbers: Iterable[int]
) -> tuple[GalleryEntry, ...]:
    """Return test pictures with the three nearest captions by each model."""
    return tuple(
        GalleryEntry(
            picture=source.picture(number, size=192),
            caption=source.caption(number),
            teacher=_nearest(source, teacher, number),
            student=_nearest(source, student, number),
        )
        for number in numbers
    )


def failures(student: EvaluatedModel, *, count: int) -> list[int]:
    """Return up to `count` pictures whose own caption the student ranks worst, and not first."""
    ranks = student.ranks.image_to_text
    worst = np.argsort(-ranks, kind="stable")[:count]
    return [int(number) for number in worst if ranks[number] > 1]


def _nearest(source: EmojiSource, model: EvaluatedModel, number: int) -> tuple[ShownAnswer, ...]:
    scores = model.text @ model.image[number]
    return tuple(
        ShownAnswer(source.caption(int(index)), float(scores[index]), int(index) == number)
        for index in np.argsort(-scores)[:3]
    )


TEACHER_TORCH, TEACHER_ONNX = "teacher torch", "teacher ONNX"
CandidateNames = dict[Tower, str]  # the benchmarked candidate of each tower


def measure_latency(
    teacher: DualEncoder,
    teacher_onnx: TowerPaths,
    bundle: Bundle,
    device: DeviceProfile,
    workload: Workload,
) -> tuple[Measurement, ...]:
    """Benchmark both towers of teacher and student."""
    image = measure_tower(teacher, teacher_onnx.graph("image"), bundle, device, workload)
    return image + measure_tower(teacher, teacher_onnx.graph("text"), bundle, device, workload)


def measure_tower(
    teacher: DualEncoder,
    teacher_onnx: TowerGraph,
    bundle: Bundle,
    device: DeviceProfile,
    workload: Workload,
) -> tuple[Measurement, ...]:
    """Benchmark a tower of the teacher in torch and ONNX, and of the student in all precisions.

    All run on the bundle's golden inputs. Ratios are to the teacher in ONNX.
    """
    tower, spec = teacher_onnx.tower, teacher.image_spec
    inputs = bundle.golden().inputs(tower)
    teacher_embed = graph_embedder(teacher_onnx, spec, device)
    candidates = (
        BenchmarkTarget(TEACHER_TORCH, torch_embedder(teacher, tower), repeat_rows(inputs)),
        BenchmarkTarget(TEACHER_ONNX, teacher_embed, repeat_rows(inputs)),
        *bundle_targets(bundle, tower, device, prefix=STUDENT),
    )
    with progress_bar(f"{tower} tower") as progress:
        measured = measure_interleaved(
            candidates, workload, part=tower, reference=TEACHER_ONNX, progress=progress
        )
    example = tower_feed(inputs[:1], tower, teacher_onnx.pixels, spec)
    models = {TEACHER_ONNX: (teacher_onnx.path, example)} | {
        STUDENT + precision: (
            bundle.tower_path(tower, precision),
            example_feed(bundle, tower, precision),
        )
        for precision in measurable_precisions(bundle, tower, device)
    }
    return tuple(
        dataclasses.replace(
            item,
            cold_start=measure_cold_start(
                *models[item.name], device=device, processes=workload.cold_starts
            ),
        )
        if item.name in models and workload.cold_starts
        else item
        for item in measured
    )


def pair_latency(measured: Sequence[Measurement], names: CandidateNames) -> Interval:
    """Return milliseconds for one image and one caption: the sum of both towers' medians.

    The interval adds up the ends of both intervals, so its coverage is at least theirs.
    """
    parts = [_of(measured, tower, name).latency.p50_ms for tower, name in names.items()]
    return Interval(
        sum(part.value for part in parts),
        sum(part.low for part in parts),
        sum(part.high for part in parts),
    )


def pair_ratio(measured: Sequence[Measurement], names: CandidateNames) -> Interval:
    """Return the time of a student's towers divided by that of the teacher's in ONNX.

    It is the mean of the towers' paired ratios (medians over rounds), weighted by the teacher's
    time for each. The ends of the interval are averaged likewise, which is conservative.
    """
    teacher = {tower: _of(measured, tower, TEACHER_ONNX).latency.p50_ms.value for tower in names}
    total = sum(teacher.values())
    value = low = high = 0.0
    for tower, name in names.items():
        paired = _of(measured, tower, name).ratio
        assert paired is not None, "every student is measured against the teacher"
        share = teacher[tower] / total
        value += share * paired.ratio.value
        low += share * paired.ratio.low
        high += share * paired.ratio.high
    return Interval(value, low, high)


def _of(measured: Sequence[Measurement], tower: Tower, name: str) -> Measurement:
    return next(item for item in measured if item.part == tower and item.name == name)
