"""Runs with names, their subjects, and quality figures: what the report of a profile is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeclip.profiles.record.measurement import Measurement, MeasurementRun, Part
from edgeclip.profiles.report.sections import NOT_AVAILABLE, Note
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

QualityUnit = Literal["share", "cosine", "points"]

PART_NAMES: dict[Part, str] = {
    "image": "image tower",
    "text": "text tower",
    "file": "from image file to embedding",
    "split": "from image file to embedding, with a server",
}
_FEW = 3  # subjects that are named one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRun:
    """A run and what the page calls it: its file, its device, its date."""

    name: str
    run: MeasurementRun


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectQuality:
    """A quality figure and which measurements it belongs to; a field that is None matches all.

    Attributes:
        metric: what it is, such as "mean cosine to fp32".
        value: in `unit`; higher is better.
        unit: a share between 0 and 1 (shown in percent), a cosine, or percentage points.
        sha256: `Identity.sha256` of what it was measured on.
        precision: precision of the towers.
        part: that it is about.
        subject: name of one measurement, for what has no identity.
    """

    metric: str
    value: Interval
    unit: QualityUnit
    sha256: str | None
    precision: Precision | None
    part: Part | None
    subject: str | None = None


# Compared by identity: a subject's samples are many, and each is made once.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """One measurement of one run; `label` is unique among the subjects of its part."""

    label: str
    item: Measurement
    source: NamedRun


def subjects_of(runs: Sequence[NamedRun]) -> tuple[Subject, ...]:
    """All measurements: by part, then by name, so that the runs of one stand side by side."""
    found = [
        Subject(
            label=item.name if len(runs) == 1 else f"{item.name} · {source.name}",
            item=item,
            source=source,
        )
        for source in runs
        for item in source.run.measurements
    ]
    parts, names = list(PART_NAMES), list(dict.fromkeys(s.item.name for s in found))
    return tuple(sorted(found, key=lambda s: (parts.index(s.item.part), names.index(s.item.name))))


def by_part(subjects: Iterable[Subject]) -> dict[Part, tuple[Subject, ...]]:
    """Subjects of each part that has any, in the order of `PART_NAMES`."""
    found = tuple(subjects)
    groups = {part: tuple(s for s in found if s.item.part == part) for part in PART_NAMES}
    return {part: group for part, group in groups.items() if group}


def full_name(subject: Subject) -> str:
    """Label and part, short: unique on the page."""
    return f"{subject.label} ({subject.item.part})"


def load_runs(paths: Sequence[Path]) -> tuple[NamedRun, ...]:
    """Read measurement files; each run is called as its file, and its folder where that repeats.

    Raises:
        ConfigError: a file that is missing or holds no measurements of this version.
    """
    stems = [path.stem for path in paths]
    names: list[str] = []
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}/{stem}"
        again = sum(known == name or known.startswith(f"{name} #") for known in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return tuple(
        NamedRun(name=name, run=MeasurementRun.load(path))
        for name, path in zip(names, paths, strict=True)
    )


def missing_notes(
    subjects: Sequence[Subject], keys: Iterable[str], *, remark: bool = False
) -> list[Note]:
    """Why something of `keys` could not be measured: one note a reason, with its subjects.

    With `remark` the reason stands for itself, since what it is about may be there in part.
    """
    wanted = set(keys)
    reasons: dict[tuple[str, str], list[Subject]] = {}
    for subject in subjects:
        for key, reason in subject.item.missing:
            if key in wanted:
                reasons.setdefault((key, reason), []).append(subject)
    notes = []
    for (key, reason), those in reasons.items():
        what = key.replace("_", " ").capitalize()
        words = reason if remark else f"{NOT_AVAILABLE} ({reason})"
        notes.append(Note(f"{what}{_of_whom(those, subjects)}: {words}"))
    return notes


def _of_whom(those: Sequence[Subject], everyone: Sequence[Subject]) -> str:
    """Names of a few subjects, numbers of many, nothing for all."""
    if len(those) == len(everyone):
        return ""
    if len(those) <= _FEW:
        return f" of {', '.join(full_name(subject) for subject in those)}"
    names = dict.fromkeys(subject.source.name for subject in those)
    parts = []
    for name in names:
        some, all_of = (sum(s.source.name == name for s in group) for group in (those, everyone))
        run = f" on {name}" if len({s.source.name for s in everyone}) > 1 else ""
        parts.append(f"{some} of {all_of} subjects{run}")
    return f" of {', '.join(parts)}"
