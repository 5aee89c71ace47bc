"""Zero-shot gate: label sets embedded by the teacher, and accuracy on them."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.emoji_scenes import BACKGROUNDS, vocabulary
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Pair, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.labels import LabelSet, bake_labels, split_names
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError

_AT_ONCE = 64  # texts
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # it becomes the name of a file


def bake_labels_with_teacher(
    teacher: DualEncoder,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    truncate: bool = False,
) -> LabelSet:
    """Embed labels in all templates with the teacher's text tower; see `labels.bake_labels`.

    Raises:
        InputError: no names, a name twice, a template without its one `{}`, or a text that is
            too long for the teacher, unless `truncate`.
    """
    tokenizer, embed = teacher.text_tokenizer, torch_embedder(teacher, "text")

    def encode(texts: list[str]) -> FloatArray:
        starts = range(0, len(texts), _AT_ONCE)
        parts = (
            tokenizer.encode(texts[start : start + _AT_ONCE], truncate=truncate, first=start)
            for start in starts
        )
        return np.concatenate([embed(part) for part in parts])

    return bake_labels(names, templates, encode, teacher.space)


def read_label_names(given: str) -> tuple[str, tuple[str, ...]]:
    """Read what `--labels` names: a label set's name, and its labels.

    Args:
        given: labels with commas between them, or a text file with a label on each line;
            `NAME=` before it names the set, which is else called after the file, or "labels".

    Raises:
        InputError: a name that cannot be a file's, an empty label, or a file that cannot be
            read.
    """
    name, equals, what = given.partition("=")
    if not equals:
        name, what = "", given
    path = Path(what)
    if path.suffix != ".txt":
        return _plain(name or "labels"), split_names(what)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the labels in {path}: {error}") from None
    return _plain(name or path.stem), tuple(line.strip() for line in lines if line.strip())


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a label set: use letters, digits, '.', '-' and '_'")
    return name


# What the captions of scenes say of an emoji alone.
EMOJI_TEMPLATES = tuple(
    f"{{}} on {'an' if name[0] in 'aeiou' else 'a'} {name} background" for name in BACKGROUNDS
)
_EMOJI_COUNT = 500  # scenes that are enough: each is a fifth of a point
_SEARCHED = 64  # scenes for each picture that is wanted, at most: one in four shows one emoji


class SubsetSource:
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
class ZeroShotSet:
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
        if isinstance(self.source, SubsetSource) and self.source.base is test:
            return self.source.numbers
        return None


def find_zero_shot(test: Source, label_sets: Iterable[LabelSet]) -> ZeroShotSet | None:
    """The pictures of `test` that a label set names; of several sets, that which names most.

    A picture's label is the name of its folder; else the only label that its caption names.
    A wrong one, such as of "a cat on a rug" where "cat" is no label and "rug" is, is wrong for
    every precision alike.

    Returns:
        None if no picture has a label.
    """
    best: ZeroShotSet | None = None
    for labels in label_sets:
        found = list(_labelled(test, labels.names))
        if found and (best is None or len(found) > len(best.right)):
            numbers, right = zip(*found, strict=True)
            best = ZeroShotSet(
                source=SubsetSource(test, numbers, f"{len(numbers)} labelled of {test.name}"),
                labels=labels,
                right=np.array(right, dtype=np.int64),
            )
    return best


def emoji_zero_shot(teacher: DualEncoder, *, count: int, size: int) -> ZeroShotSet:
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
    return ZeroShotSet(
        source=SubsetSource(
            scenes, numbers, f"EmojiScenes test, {len(numbers)} scenes of one emoji"
        ),
        labels=bake_labels_with_teacher(teacher, names, EMOJI_TEMPLATES, truncate=True),
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
