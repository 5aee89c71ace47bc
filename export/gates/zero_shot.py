"""Make label sets with the teacher, and find labelled pictures to judge zero-shot accuracy on."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.emoji_scenes import BACKGROUNDS, vocabulary
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Pair, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import LabelSet, bake_labels, embedder_of
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.text_files import labels_file, read_label_file, split_names

_AT_ONCE = 64  # texts
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # it becomes the name of a file


def bake_labels_with_teacher(
    teacher: DualEncoder,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    truncate: bool = False,
) -> LabelSet:
    """Embed labels in all templates with the teacher's text tower.

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

    return bake_labels(
        names,
        templates,
        encode,
        teacher.space,
        lambda: embedder_of(f"text torch {space_fingerprint(teacher)}"),
    )


def read_label_names(argument: str) -> tuple[str, tuple[str, ...]]:
    """Parse a value of `--labels` into a label set's name and its labels.

    Args:
        argument: labels with commas between them, or a file with a label on each line; `NAME=`
            before it names the set, which is otherwise named after the file, or "labels".

    Raises:
        InputError: a name that cannot be a file's, an empty label, or a file that cannot be
            read.
    """
    name, equals, what = argument.partition("=")
    if not equals:
        name, what = "", argument
    path = labels_file(what)
    if path is None:
        return _plain(name or "labels"), split_names(what)
    return _plain(name or path.stem), read_label_file(path)


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a label set: use letters, digits, '.', '-' and '_'")
    return name


# The captions of scenes that show one emoji.
EMOJI_TEMPLATES = tuple(
    f"{{}} on {'an' if name[0] in 'aeiou' else 'a'} {name} background" for name in BACKGROUNDS
)
_EMOJI_COUNT = 1_500  # scenes that are enough: a thousand without a loss tell half a point
_SEARCHED = 64  # scenes for each picture that is wanted, at most: one in four shows one emoji


class SubsetSource:
    """A subset of the pairs of another source.

    Args:
        base: the source.
        numbers: the indices of the pairs in `base`.
        name: the name for messages and records.
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

    def captions(self, index: int) -> tuple[str, ...]:
        return self.base.captions(self.numbers[index])

    def content(self, index: int) -> str:
        """Return the content of a picture; see `Source`."""
        return self.base.content(self.numbers[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroShotSet:
    """Labelled pictures, and the label set to classify them with.

    Attributes:
        source: the pictures.
        labels: the label set, embedded by the teacher.
        targets: int64 [N], the index of each picture's label in `labels`.

    Raises:
        ValueError: no pictures, not one label for each, or an index outside the label set.
    """

    source: Source
    labels: LabelSet
    targets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.source) or self.targets.shape != (len(self.source),):
            raise ValueError(f"{self.source.name}: give each picture one label")
        if self.targets.min() < 0 or self.targets.max() >= len(self.labels.names):
            raise ValueError(f"{self.source.name}: a picture has a label that is not in the set")

    def rows_of(self, test: Source) -> tuple[int, ...] | None:
        """Return the indices of the pictures in `test`, if they were taken from it."""
        if isinstance(self.source, SubsetSource) and self.source.base is test:
            return self.source.numbers
        return None


def find_zero_shot(test: Source, label_sets: Iterable[LabelSet]) -> ZeroShotSet | None:
    """Find the pictures of `test` that a label set names; use the label set that names most.

    A picture's label is the name of its folder, or else the only label in its captions. A wrong
    label ("rug" for "a cat on a rug" where "cat" is no label) is wrong for every precision alike.

    Returns:
        None if no picture has a label.
    """
    best: ZeroShotSet | None = None
    for labels in label_sets:
        found = list(_labelled(test, labels.names))
        if found and (best is None or len(found) > len(best.targets)):
            numbers, targets = zip(*found, strict=True)
            best = ZeroShotSet(
                source=SubsetSource(test, numbers, f"{len(numbers)} labelled of {test.name}"),
                labels=labels,
                targets=np.array(targets, dtype=np.int64),
            )
    return best


def emoji_zero_shot(teacher: DualEncoder, *, count: int, size: int) -> ZeroShotSet:
    """Make a zero-shot set of test scenes with a single emoji, labelled with its name.

    Args:
        teacher: embeds the names in sentences; those too long for it are cut.
        count: number of pictures, at most 1,500; no two have the same caption.
        size: side of a picture, in pixels.
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
        targets=np.array([places[name] for name in shown], dtype=np.int64),
    )


def _labelled(test: Source, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the index and the label index of each picture that has a label."""
    places = {name.casefold(): place for place, name in enumerate(names)}
    # The longest first, so that "red apple" is not taken for "apple".
    ordered = sorted(places, key=len, reverse=True)
    named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)")
    for number in range(len(test)):
        folder = ""
        if isinstance(test, FolderSource):
            folder = Path(test.paths[number]).parent.name.replace("_", " ").casefold()
        found = {folder} & places.keys()
        for caption in () if found else test.captions(number):
            found |= set(named.findall(caption.casefold()))
        if len(found) == 1:
            yield number, places[found.pop()]
