"""Summarise a demo run: `summary.json`, the table for the terminal, the data of the report."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.train.curves import training_curves
from edgeclip.export.demo.evaluate import (
    SHIPPED,
    STUDENT,
    TEACHER,
    TEACHER_ONNX,
    TEACHER_TORCH,
    CandidateNames,
    EvaluatedModel,
    failures,
    gallery,
    pair_latency,
    pair_ratio,
    quality_row,
    shipped_name,
)
from edgeclip.export.graph.embedders import TOWERS
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.report.bundle_report import (
    Headline,
    ParetoPoint,
    ReportData,
    RunStep,
    ShippedPrecision,
)
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_file, json_fields
from edgeclip.runtime.console import percent, percent_interval
from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model's R@1 (mean of both directions), time for one image and one caption, and size."""

    name: str
    r1: Interval
    pair_ms: Interval
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSummary:
    """The figures of one run; R@1 and ratios are shares in [0, 1].

    Attributes:
        student: `trained in this run` or `kept in the repository`.
        chosen: the precision of each tower that ships, such as `image int8, text fp32`.
        retention: R@1 of the chosen student over the teacher's, on the same pairs.
        latency_ratio: time of the chosen student for one image and one caption at batch 1,
            over the teacher's in ONNX fp32.
        intervals: the 95% interval of each figure, by its name.
        unseen_teacher_r1, unseen_student_r1: R@1 on scenes of emoji that no training showed.
    """

    student: str
    chosen: str
    teacher_r1: float
    student_fp32_r1: float
    student_int8_r1: float | None
    student_chosen_r1: float
    retention: float
    latency_ratio: float
    image_latency_ratio: float
    text_latency_ratio: float
    unseen_teacher_r1: float
    unseen_student_r1: float
    intervals: dict[str, Interval]
    seconds: dict[str, float]
    machine: Machine
    command: str
    retention_bar: float = 0.975
    latency_bar: float = 0.32

    @property
    def keeps_enough(self) -> bool:
        """Whether the student keeps enough of the teacher's R@1."""
        return self.retention >= self.retention_bar

    @property
    def fast_enough(self) -> bool:
        """Whether the student is fast enough."""
        return self.latency_ratio <= self.latency_bar

    def save(self, path: Path) -> None:
        """Write the summary as JSON, whole or not at all."""
        with atomic_file(path) as temporary:
            data = asdict(self, dict_factory=json_fields)
            text = json.dumps(data, indent=2, allow_nan=False) + "\n"
            temporary.write_text(text, encoding="utf-8")


def summary_rows(
    models: Sequence[EvaluatedModel],
    teacher_weights: Path,
    teacher_onnx: TowerPaths,
    bundle: Bundle,
    shipped: Mapping[Tower, Precision],
    measured: Sequence[Measurement],
) -> tuple[ModelRow, ...]:
    """Return one row for each model; the teacher's two engines share its R@1."""
    teacher, *students = models
    files = {
        TEACHER_TORCH: teacher_weights.glob("*.safetensors"),
        TEACHER_ONNX: (teacher_onnx.image, teacher_onnx.text),
    }
    rows = [
        _row(name, teacher, dict.fromkeys(TOWERS, name), paths, measured)
        for name, paths in files.items()
    ]
    return (*rows, *(_student_row(student, bundle, shipped, measured) for student in students))


def _student_row(
    student: EvaluatedModel,
    bundle: Bundle,
    shipped: Mapping[Tower, Precision],
    measured: Sequence[Measurement],
) -> ModelRow:
    precisions = dict(shipped)
    if student.name != SHIPPED:
        (precision,) = (p for p in get_args(Precision) if student.name == STUDENT + p)
        precisions = dict.fromkeys(TOWERS, precision)
    names: CandidateNames = {tower: STUDENT + precision for tower, precision in precisions.items()}
    files = [bundle.tower_path(tower, precision) for tower, precision in precisions.items()]
    return _row(student.name, student, names, files, measured)


def _row(
    name: str,
    model: EvaluatedModel,
    names: CandidateNames,
    files: Iterable[Path],
    measured: Sequence[Measurement],
) -> ModelRow:
    return ModelRow(
        name=name,
        r1=model.mean_r1,
        pair_ms=pair_latency(measured, names),
        bytes=sum(path.stat().st_size for path in files),
    )


def summarise(
    student: str,
    *,
    models: Sequence[EvaluatedModel],
    unseen: tuple[EvaluatedModel, EvaluatedModel],
    shipped: Mapping[Tower, Precision],
    measured: Sequence[Measurement],
    steps: Sequence[RunStep],
    command: str,
) -> DemoSummary:
    """Compute all figures of a run; `models` are the results of `evaluate`."""
    by_name = {model.name: model for model in models}
    teacher, chosen = by_name[TEACHER], by_name[shipped_name(shipped)]
    names: CandidateNames = {tower: STUDENT + item for tower, item in shipped.items()}
    intervals = {
        "teacher_r1": teacher.mean_r1,
        "teacher_image_to_text_r1": estimate_share(teacher.ranks.image_to_text <= 1).interval,
        "teacher_text_to_image_r1": estimate_share(teacher.ranks.text_to_image <= 1).interval,
        "student_chosen_r1": chosen.mean_r1,
        "retention": estimate_kept(chosen.ranks.hits(1), teacher.ranks.hits(1)).interval,
        "latency_ratio": pair_ratio(measured, names),
        "image_latency_ratio": pair_ratio(measured, {"image": names["image"]}),
        "text_latency_ratio": pair_ratio(measured, {"text": names["text"]}),
        "unseen_teacher_r1": unseen[0].mean_r1,
        "unseen_student_r1": unseen[1].mean_r1,
    }
    for precision in get_args(Precision):
        if STUDENT + precision in by_name:
            intervals[f"student_{precision}_r1"] = by_name[STUDENT + precision].mean_r1
    values = {name: interval.value for name, interval in intervals.items()}
    return DemoSummary(
        student=student,
        chosen=", ".join(f"{tower} {item}" for tower, item in shipped.items()),
        teacher_r1=values["teacher_r1"],
        student_fp32_r1=values["student_fp32_r1"],
        student_int8_r1=values.get("student_int8_r1"),
        student_chosen_r1=values["student_chosen_r1"],
        retention=values["retention"],
        latency_ratio=values["latency_ratio"],
        image_latency_ratio=values["image_latency_ratio"],
        text_latency_ratio=values["text_latency_ratio"],
        unseen_teacher_r1=values["unseen_teacher_r1"],
        unseen_student_r1=values["unseen_student_r1"],
        intervals=intervals,
        seconds={step.name: step.seconds for step in steps},
        machine=detect_machine(),
        command=command,
    )


def summary_table(
    rows: Sequence[ModelRow],
    measured: Sequence[Measurement],
    steps: Sequence[RunStep],
    summary: DemoSummary,
) -> str:
    """Return the table of models and the verdicts, for the terminal."""
    lines = [f"{'model':<20}{'R@1':>8}{'95% interval':>18}{'ms a pair':>12}{'MB':>8}"]
    for row in rows:
        interval = f"{row.r1.low:.1%} to {row.r1.high:.1%}"
        figures = f"{row.pair_ms.value:>12.2f}{row.bytes / 1e6:>8.1f}"
        lines.append(f"{row.name:<20}{row.r1.value:>8.1%}{interval:>18}{figures}")
    contended = any(item.contended for item in measured)
    spent = ", ".join(f"{step.name} {step.seconds:.0f} s" for step in steps)
    return "\n".join(
        (
            *lines,
            "",
            f"The student, {summary.student}, ships {summary.chosen}.",
            _verdict(
                summary.intervals["retention"],
                f"of the teacher's R@1 kept, bar >= {percent(summary.retention_bar)}",
                met=summary.keeps_enough,
            ),
            _verdict(
                summary.intervals["latency_ratio"],
                f"of its time needed, bar <= {summary.latency_bar:.0%}",
                met=summary.fast_enough,
            ),
            *(["Other work kept the processor busy: ratios hold better than times."] * contended),
            "",
            f"{sum(step.seconds for step in steps):.0f} s: {spent}",
        )
    )


def _verdict(interval: Interval, what: str, *, met: bool) -> str:
    return (
        f"{interval.value:.1%} ({percent_interval(interval)}) {what}: {'pass' if met else 'MISS'}"
    )


CREDITS = (
    "Pictograms: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0.",
    "Names of emoji: Unicode CLDR, through the Python package emoji (BSD).",
    "EdgeCLIP: Apache-2.0.",
)
_SHOWN = 9


def report_data(
    summary: DemoSummary,
    bundle: Bundle,
    shipped: Mapping[Tower, Precision],
    source: EmojiSource,
    models: Sequence[EvaluatedModel],
    unseen: Sequence[EvaluatedModel],
    rows: Sequence[ModelRow],
    measured: Sequence[Measurement],
    steps: Sequence[RunStep],
    log: Path | None,
) -> ReportData:
    """Everything the page shows; `models` as `evaluate` gives them."""
    teacher, name = models[0], shipped_name(shipped)
    student = next(model for model in models if model.name == name)
    return ReportData(
        title="From teacher to device, on EmojiScenes",
        summary=_sentence(summary),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headlines=_headlines(summary),
        choices=_choices(bundle, shipped),
        steps=tuple(steps),
        quality=tuple(quality_row(model) for model in (*models, *unseen)),
        measurements=tuple(measured),
        pareto=_pareto(rows, name),
        quality_name="R@1, mean of both directions",
        latency_name="an image and a caption",
        quality_bar=summary.retention_bar * summary.teacher_r1,
        losses=() if log is None else training_curves(log),
        gates=tuple(bundle.manifest.all_gates()),
        gallery=gallery(source, teacher, student, range(_SHOWN)),
        failures=gallery(source, teacher, student, failures(student, count=_SHOWN)),
        machine=summary.machine,
        commands=(summary.command,),
        credits=CREDITS,
    )


def _sentence(summary: DemoSummary) -> str:
    return (
        f"A student {summary.student}, {summary.chosen}, keeps {summary.retention:.1%} of the "
        f"teacher's R@1 in {summary.latency_ratio:.1%} of its time. On emoji that no training "
        f"showed, R@1 is {summary.unseen_teacher_r1:.1%} for the teacher and "
        f"{summary.unseen_student_r1:.1%} for the student."
    )


def _headlines(summary: DemoSummary) -> tuple[Headline, ...]:
    return (
        Headline(
            name="of the teacher's R@1 kept",
            value=summary.intervals["retention"],
            bar=summary.retention_bar,
            direction=">=",
            note="mean of both directions over unseen scenes, paired",
        ),
        Headline(
            name="of the teacher's time needed",
            value=summary.intervals["latency_ratio"],
            bar=summary.latency_bar,
            direction="<=",
            note="one image and one caption at batch 1, against the teacher in ONNX fp32",
        ),
    )


def _choices(bundle: Bundle, shipped: Mapping[Tower, Precision]) -> tuple[ShippedPrecision, ...]:
    choices = []
    for item in bundle.manifest.towers:
        times = ", ".join(
            f"{file.precision} {file.latency_ms:.2f} ms"
            for file in item.files
            if file.latency_ms is not None
        )
        why = f"fp32 gives way only to what is surely faster inside its gates: {times}"
        choices.append(ShippedPrecision(item.tower, shipped[item.tower], why))
    return tuple(choices)


def _pareto(rows: Sequence[ModelRow], shipped: str) -> tuple[ParetoPoint, ...]:
    return tuple(
        ParetoPoint(
            name=row.name,
            role="teacher" if row.name.startswith("teacher") else "student",
            quality=row.r1,
            latency_ms=row.pair_ms,
            bytes=row.bytes,
            chosen=row.name == shipped,
        )
        for row in rows
    )
