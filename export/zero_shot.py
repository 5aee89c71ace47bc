"""Labelled pictures, on which the loss of zero-shot accuracy is judged."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.emoji_scenes import BACKGROUNDS, vocabulary
from edgeclip.compress.sources import EmojiSource, FolderSource, Pair, Source
from edgeclip.export.bake_labels import bake_by_teacher
from edgeclip.runtime.labels import LabelSet

# What the captions of scenes say of an emoji alone.
EMOJI_TEMPLATES = tuple(
    f"{{}} on {'an' if name[0] in 'aeiou' else 'a'} {name} background" for name in BACKGROUNDS
)
_EMOJI_COUNT = 500  # scenes that are enough: each is a fifth of a point
_SEARCHED = 64  # scenes for each picture that is wanted, at most: one in four shows one emoji


class Chosen:
    """Some pairs of another source.

    Args:
        base: where they come from.
        numbers: of the pairs there.
        name: what a person calls them.
    """

    def __init__(self, base: Source, numbers: Sequence[int], name: str) -> None:
        self.base = base
        self.numbers = tuple(numbers)
        self.name = name
        self.split = base.split
        self.has_captions = base.has_captions
        chosen = hashlib.sha256(repr(self.numbers).encode()).hexdigest()
        self.identity = f"chosen:{chosen}:{base.identity}"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Pair:
        return self.base[self.numbers[index]]

    def caption(self, index: int) -> str | None:
        return self.base.caption(self.numbers[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroShot:
    """Pictures whose label is known, and the label set that they are told apart by.

    Attributes:
        source: the pictures.
        labels: made by the teacher.
        right: int64 [N], the place of each picture's label in `labels`.

    Raises:
        ValueError: no pictures, not one label for each, or a label that there is not.
    """

    source: Source
    labels: LabelSet
    right: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.source) or self.right.shape != (len(self.source),):
            raise ValueError(f"{self.source.name}: give each picture one label")
        if self.right.min() < 0 or self.right.max() >= len(self.labels.names):
            raise ValueError(f"{self.source.name}: a picture has a label that is not in the set")

    def rows_of(self, test: Source) -> tuple[int, ...] | None:
        """The numbers of the pictures in `test`, if they were taken from it."""
        if isinstance(self.source, Chosen) and self.source.base is test:
            return self.source.numbers
        return None


def find_zero_shot(test: Source, label_sets: Iterable[LabelSet]) -> ZeroShot | None:
    """The pictures of `test` that a label set names; of several sets, that which names most.

    A picture's label is the name of its folder; else the only label that its caption names.
    A wrong one, such as of "a cat on a rug" where "cat" is no label and "rug" is, is wrong for
    every precision alike.

    Returns:
        None if no picture has a label.
    """
    best: ZeroShot | None = None
    for labels in label_sets:
        found = list(_labelled(test, labels.names))
        if found and (best is None or len(found) > len(best.right)):
            numbers, right = zip(*found, strict=True)
            best = ZeroShot(
                source=Chosen(test, numbers, f"{len(numbers)} labelled of {test.name}"),
                labels=labels,
                right=np.array(right, dtype=np.int64),
            )
    return best


def emoji_zero_shot(teacher: DualEncoder, *, count: int, size: int) -> ZeroShot:
    """Test scenes of one emoji alone, which is to be told from all others that are shown.

    Args:
        teacher: embeds the names in sentences; those too long for it are cut.
        count: how many pictures, but no more than are enough; no two have the same caption.
        size: of a picture, in pixels.
    """
    count = min(count, _EMOJI_COUNT)
    scenes = EmojiSource("test", _SEARCHED * count, size=size)
    numbers, captions = [], set()
    for number in range(len(scenes)):
        scene = scenes.scene(number)
        if len(scene.objects) == 1 and scene.caption not in captions:
            captions.add(scene.caption)
            numbers.append(number)
        if len(numbers) == count:
            break
    emoji = vocabulary()
    shown = [emoji[scenes.scene(number).objects[0].emoji].name for number in numbers]
    names = tuple(sorted(set(shown)))
    places = {name: place for place, name in enumerate(names)}
    return ZeroShot(
        source=Chosen(scenes, numbers, f"EmojiScenes test, {len(numbers)} scenes of one emoji"),
        labels=bake_by_teacher(teacher, names, EMOJI_TEMPLATES, truncate=True),
        right=np.array([places[name] for name in shown], dtype=np.int64),
    )


def _labelled(test: Source, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the number and the label of each picture that has one."""
    places = {name.casefold(): place for place, name in enumerate(names)}
    # The longest first, so that "red apple" is not taken for "apple".
    ordered = sorted(places, key=len, reverse=True)
    named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)")
    for number in range(len(test)):
        folder = ""
        if isinstance(test, FolderSource):
            folder = Path(test.paths[number]).parent.name.replace("_", " ").casefold()
        found = {folder} & places.keys()
        found = found or set(named.findall((test.caption(number) or "").casefold()))
        if len(found) == 1:
            yield number, places[found.pop()]
