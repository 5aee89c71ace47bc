"""Groups of pictures that the data know of, and what a student keeps of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.picture_groups import Groups, read_groups
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Source
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.interval import Estimate, Interval
from edgeclip.runtime.stats.shares import KeptEstimate, estimate_kept, estimate_share
from edgeclip.runtime.stats.three_outcomes import BoundTest, judge

LEAST_IN_GROUP = 20  # pictures; smaller groups are counted, not judged
_OF_SCENES = ("background", "objects", "layout")


def find_groups(source: Source, by: Sequence[str], table: Path | None) -> tuple[Groups, ...]:
    """Group pictures by what is known of them.

    Args:
        source: the pictures.
        by: of scenes `background`, `objects` and `layout`; of a folder `folder`, or columns of
            a table; empty for all that is known without a table.
        table: see `read_groups`.

    Raises:
        ConfigError: something that the data do not know, or a table of which nothing is asked.
        InputError: see `read_groups`.
    """
    if table is not None and not isinstance(source, FolderSource):
        raise ConfigError(
            f"--group-table {table}: a table groups the pictures of a folder, not {source.name}"
        )
    if table is not None and not set(by) - {"folder"}:
        raise ConfigError(
            f"--group-table {table}: name a column of it to group pictures by, with --group-by"
        )
    if isinstance(source, EmojiSource):
        unknown = sorted(set(by) - set(_OF_SCENES))
        if unknown:
            raise ConfigError(
                f"--group-by {unknown[0]}: scenes are grouped by {', '.join(_OF_SCENES)}"
            )
        return tuple(_of_scenes(source, name) for name in by or _OF_SCENES)
    if isinstance(source, FolderSource):
        folders = [path.parent.as_posix() for path in source.paths]
        common = (_grouped("folder", folders),) if len(set(folders)) > 1 else ()
        if not by:
            return common
        if "folder" in by and not common:
            raise ConfigError(
                f"--group-by folder: all pictures of {source.name} lie in one folder, {folders[0]}"
            )
        given = [name for name in by if name != "folder"]
        return (common if "folder" in by else ()) + tuple(
            read_groups(source, table, name) for name in given
        )
    if by:
        raise ConfigError(
            f"{source.name}: --group-by is for the built-in scenes and for folders of pictures"
        )
    parts = parts_of(source)
    if len(parts) < 2:
        return ()
    numbers = np.repeat(np.arange(len(parts)), [part.count for part in parts])
    return (Groups("source", tuple(str(n + 1) for n in range(len(parts))), numbers),)


def taken(groups: Sequence[Groups], rows: NDArray[np.int64]) -> tuple[Groups, ...]:
    """Return the groups of some of the pictures."""
    return tuple(Groups(item.column, item.names, item.number[rows]) for item in groups)


def _of_scenes(source: EmojiSource, by: str) -> Groups:
    scenes = [source.scene(index) for index in range(len(source))]
    if by == "background":
        return _grouped(by, [scene.background for scene in scenes])
    if by == "objects":
        return _grouped(by, [str(len(scene.objects)) for scene in scenes])
    words = ("left of", "right of", "above", "below")
    layouts = [
        next((word for word in words if f" {word} " in scene.caption), "alone") for scene in scenes
    ]
    return _grouped(by, layouts)


def _grouped(column: str, names: Sequence[str]) -> Groups:
    known = sorted(set(names))
    places = {name: place for place, name in enumerate(known)}
    return Groups(column, tuple(known), np.array([places[name] for name in names], np.int64))


@dataclass(frozen=True, slots=True)
class DifferenceEstimate(Estimate):
    """A difference of two independent estimates, with bounds from the bounds of both.

    The square-and-add method that Newcombe (Statistics in Medicine 17, 1998) gave for shares, and
    Zou and Donner (Statistics in Medicine 27, 2008) for any two estimates (MOVER).

    Attributes:
        first, second: the estimates.
    """

    first: Estimate
    second: Estimate

    @property
    def value(self) -> float:  # type: ignore[override]
        """The first less the second."""
        return self.first.value - self.second.value

    def lower_bound(self, confidence: float) -> float:
        """See `Estimate`."""
        below = self.first.value - self.first.lower_bound(confidence)
        above = self.second.upper_bound(confidence) - self.second.value
        return self.value - float(np.hypot(below, above))

    def upper_bound(self, confidence: float) -> float:
        """See `Estimate`."""
        above = self.first.upper_bound(confidence) - self.first.value
        below = self.second.value - self.second.lower_bound(confidence)
        return self.value + float(np.hypot(above, below))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQuality:
    """What a model keeps of its teacher's R@1 in one group.

    Attributes:
        column, name: of the group.
        pictures: how many.
        r1, teacher_r1: share of hits, both directions.
        kept: R@1 over the teacher's; None where the teacher has no hit.
        behind: the kept share of all other pictures less that of the group.
        is_behind: whether it is above 0, by Holm's method over all groups of all columns.
    """

    column: str
    name: str
    pictures: int
    r1: Interval
    teacher_r1: Interval
    kept: Interval
    behind: Interval
    is_behind: bool


def group_quality(
    groups: Sequence[Groups], hits: Values, teacher_hits: Values
) -> tuple[GroupQuality, ...]:
    """Judge the groups of `LEAST_IN_GROUP` pictures or more, where both sides have hits.

    Args:
        groups: the groups by each column.
        hits, teacher_hits: of each picture, 0 to 1, [N].
    """
    found: list[tuple[Groups, int, NDArray[np.bool_], KeptEstimate, DifferenceEstimate]] = []
    for item in groups:
        for number in range(len(item.names)):
            inside = item.number == number
            rest = ~inside
            if inside.sum() < LEAST_IN_GROUP or rest.sum() < LEAST_IN_GROUP:
                continue
            if not (teacher_hits[inside].any() and teacher_hits[rest].any()):
                continue
            kept = estimate_kept(hits[inside], teacher_hits[inside])
            others = estimate_kept(hits[rest], teacher_hits[rest])
            found.append((item, number, inside, kept, DifferenceEstimate(others, kept)))
    outcomes = judge([BoundTest((behind,), "<=", 0.0) for *_, behind in found])
    return tuple(
        GroupQuality(
            column=item.column,
            name=item.names[number],
            pictures=int(inside.sum()),
            r1=estimate_share(hits[inside]).interval,
            teacher_r1=estimate_share(teacher_hits[inside]).interval,
            kept=kept.interval,
            behind=behind.interval,
            is_behind=outcome == "failed",
        )
        for (item, number, inside, kept, behind), outcome in zip(found, outcomes, strict=True)
    )
