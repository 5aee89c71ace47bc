"""From what a demo run found to the data of its report."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgeclip.compress.sources import EmojiSource
from edgeclip.compress.train_loop import read_log
from edgeclip.export.demo_quality import Embedded, failures, gallery, quality_row, shipped_name
from edgeclip.export.demo_summary import Row, Summary
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.measuring.measurement import Measurement
from edgeclip.runtime.reporting.report_data import (
    Choice,
    Gate,
    Headline,
    LossCurve,
    ParetoPoint,
    ReportData,
    Stage,
)
from edgeclip.runtime.spec import Precision, Tower

CREDITS = (
    "Pictograms: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0.",
    "Names of emoji: Unicode CLDR, through the Python package emoji (BSD).",
    "EdgeCLIP: Apache-2.0.",
)
_SHOWN = 9


def report_data(
    summary: Summary,
    bundle: Bundle,
    shipped: Mapping[Tower, Precision],
    source: EmojiSource,
    models: Sequence[Embedded],
    unseen: Sequence[Embedded],
    rows: Sequence[Row],
    measured: Sequence[Measurement],
    stages: Sequence[Stage],
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
        stages=tuple(stages),
        quality=tuple(quality_row(model) for model in (*models, *unseen)),
        measurements=tuple(measured),
        pareto=_pareto(rows, name),
        quality_name="R@1, mean of both directions",
        latency_name="an image and a caption",
        quality_bar=summary.retention_bar * summary.teacher_r1,
        losses=() if log is None else _curves(log),
        gates=tuple(Gate(subject, record) for subject, record in bundle.manifest.all_gates()),
        gallery=gallery(source, teacher, student, range(_SHOWN)),
        failures=gallery(source, teacher, student, failures(student, most=_SHOWN)),
        machine=summary.machine,
        commands=(summary.command,),
        credits=CREDITS,
    )


def _sentence(summary: Summary) -> str:
    return (
        f"A student {summary.student}, {summary.chosen}, keeps {summary.retention:.1%} of the "
        f"teacher's R@1 in {summary.latency_ratio:.1%} of its time. On emoji that no training "
        f"showed, R@1 is {summary.unseen_teacher_r1:.1%} for the teacher and "
        f"{summary.unseen_student_r1:.1%} for the student."
    )


def _headlines(summary: Summary) -> tuple[Headline, ...]:
    return (
        Headline(
            name="of the teacher's R@1 kept",
            value=summary.intervals["retention"],
            bar=summary.retention_bar,
            direction=">=",
            note="mean of both directions over unseen scenes, paired bootstrap",
        ),
        Headline(
            name="of the teacher's time needed",
            value=summary.intervals["latency_ratio"],
            bar=summary.latency_bar,
            direction="<=",
            note="one image and one caption at batch 1, against the teacher in ONNX fp32",
        ),
    )


def _choices(bundle: Bundle, shipped: Mapping[Tower, Precision]) -> tuple[Choice, ...]:
    choices = []
    for item in bundle.manifest.towers:
        times = ", ".join(
            f"{file.precision} {file.latency_ms:.2f} ms"
            for file in item.files
            if file.latency_ms is not None
        )
        why = f"fp32 gives way only to what is surely faster inside its gates: {times}"
        choices.append(Choice(item.tower, shipped[item.tower], why))
    return tuple(choices)


def _pareto(rows: Sequence[Row], shipped: str) -> tuple[ParetoPoint, ...]:
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


def _curves(log: Path) -> tuple[LossCurve, ...]:
    lines = read_log(log)
    steps = tuple(line["step"] for line in lines)
    names = [name for name in lines[0] if name not in {"step", "seconds"}]
    return tuple(LossCurve(name, steps, tuple(line[name] for line in lines)) for name in names)
