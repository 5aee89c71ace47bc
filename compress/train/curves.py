"""Draw the losses of a training run, and how well student and teacher agree, over its steps."""

import importlib.util
from pathlib import Path

from edgeclip.compress.train.held_out import IMAGE_COSINE, STUDENT_R1, TEACHER_R1, TEXT_COSINE
from edgeclip.compress.train.train_loop import read_log
from edgeclip.profiles.report.charts import TrainingCurve
from edgeclip.profiles.report.sections import FigureGrid, Note, Page, PageSummary, Section
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.console import percent

_TITLES = {
    IMAGE_COSINE: "held-out cosine, images",
    TEXT_COSINE: "held-out cosine, texts",
    STUDENT_R1[0]: "held-out R@1, images",
    STUDENT_R1[1]: "held-out R@1, texts",
}


def training_curves(log: Path) -> tuple[TrainingCurve, ...]:
    """Make a curve of each series of a training log; the teacher's R@1 is a line beside its own."""
    lines = read_log(log)
    curves, teachers = [], dict(zip(STUDENT_R1, TEACHER_R1, strict=True))
    for name in (name for name in lines[0] if name not in {"step", "seconds", *TEACHER_R1}):
        there = [line for line in lines if name in line]  # not every step is validated
        steps, values = (tuple(line[key] for line in there) for key in ("step", name))
        teacher = there[-1][teachers[name]] if name in teachers else None
        curves.append(
            TrainingCurve(
                _TITLES.get(name, name.replace("_", " ")),
                steps,
                values,
                reference=None if teacher is None else (teacher, f"teacher {percent(teacher)}"),
            )
        )
    return tuple(curves)


def write_curves(run: Path, *, title: str) -> Path | None:
    """Write `curves.html` into the directory of a run; None if the extra `report` is missing."""
    if not all(map(importlib.util.find_spec, ("jinja2", "matplotlib"))):
        return None
    note = Note(
        "Held-out pictures are not trained on: on them each tower is compared with the teacher's. "
        "Each point of a loss is the mean of neighbouring steps."
    )
    curves = FigureGrid(training_curves(run / "log.jsonl"))
    page = Page(
        title=title,
        lead=(),
        summary=PageSummary("", ""),
        sections=(Section(anchor="curves", title="Training", blocks=(note, curves)),),
    )
    path = run / "curves.html"
    write_html(page, path)
    return path
