"""Open the data of `--data` by split, whatever it is made of."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from edgeclip.compress.data.emoji_scenes import Drawing, Split
from edgeclip.compress.data.fetch_shards import is_remote
from edgeclip.compress.data.hub_source import open_dataset
from edgeclip.compress.data.mixture import Mixture
from edgeclip.compress.data.shards import open_shards
from edgeclip.compress.data.sources import (
    EMOJI,
    INK_EMOJI,
    EmojiSource,
    FolderSource,
    Source,
    readable,
)
from edgeclip.compress.data.splits import EmptySplitError
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import MaxBad, is_table, leave_out_others
from edgeclip.runtime.inputs.images import IMAGE_SUFFIXES

_PARQUET = ".parquet"
_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)")
# `?first=100` is no weight, and neither is the option of a command, `pipe:... --jobs=4`.
_OPTION = re.compile(r"[?&](?!stream=)\w+=[^=&?]*$|\s-[-\w]+=[^=]*$")


def open_source(
    data: str | Sequence[str],
    *,
    split: Split,
    count: int,
    size: int,
    strict: bool = False,
    max_bad: MaxBad | None = None,
) -> Source:
    """Open the data of `--data`, one source or several.

    A source is spelled

    - `emoji`: the built-in scenes, `count` of them; `emoji-ink`: the same drawn in lines alone;
    - `DIR`: a folder of pictures, or of WebDataset shards;
    - `'DIR/*.tar'`, `DIR/{00000..00999}.tar`, `https://.../{000..099}.tar`, `pipe:COMMAND`:
      WebDataset shards, see `open_shards`;
    - `hf:REPO`, `hf:DIR`, `parquet:FILES`: what the package `datasets` opens, see `open_dataset`.

    `=WEIGHT` behind it is its share of the training samples beside the weights of the others;
    without weights every picture counts alike, see `Mixture`.

    Data that says itself which split an item is of is divided by that: a folder by subfolders
    named after the splits, or by Karpathy's or COCO's annotations. All else is divided by a hash of
    each item's path or key: 80% train, 10% calibration, 10% test. So what int8 is calibrated on
    never decides whether it passes its gates. A caption table lies in the subfolder of the split,
    or one for all splits in the folder.

    With `max_bad` every picture but of scenes is decoded, and those that cannot be are left out.

    Raises:
        ConfigError: some of the subfolders are there, but not the one for `split`; or no picture
            is of the split.
        InputError: no folder, no pictures in it, with `strict` files that would be left out, or
            more unreadable pictures than `max_bad` allows.
    """
    given = [split_weight(item) for item in ([data] if isinstance(data, str) else data)]
    if not given:
        raise ConfigError("there is no data: give --data at least once")
    bare = [item for item, weight in given if weight is None]
    if bare and len(bare) < len(given):
        raise ConfigError(
            f"--data {bare[0]} has no weight: write =WEIGHT behind every --data or behind none"
        )
    opened: list[Source] = []
    weights: list[float | None] = []
    for item, weight in given:
        try:
            source = _open_one(item, split=split, count=count, size=size, strict=strict)
        except EmptySplitError:
            # A small source may have none to judge on, where another has.
            if split == "train" or ((item, weight) == given[-1] and not opened):
                raise
            continue
        opened.append(source)
        weights.append(weight)
    source = Mixture(opened, weights) if len(given) > 1 else opened[0]
    return source if max_bad is None else readable(source, max_bad)


def split_weight(data: str) -> tuple[str, float | None]:
    """Return a value of `--data` without its weight, and the weight: `photos=0.7`.

    Raises:
        ConfigError: a weight that is not above 0.
    """
    match = _WEIGHTED.fullmatch(data)
    if match is None or Path(data).exists() or _OPTION.search(data):
        return data, None
    weight = float(match[2])
    if weight <= 0:
        raise ConfigError(f"--data {data}: a weight must be above 0; leave the source out instead")
    return match[1], weight


def _open_one(data: str, *, split: Split, count: int, size: int, strict: bool) -> Source:
    if data in (EMOJI, INK_EMOJI):
        drawing: Drawing = "colour" if data == EMOJI else "ink"
        return EmojiSource(split, count, size=size, distinct=split != "train", drawing=drawing)
    if data.startswith(("hf:", "parquet:")):
        return open_dataset(data, split=split, size=size)
    if is_shards(data):
        return open_shards(data, split=split, size=size)
    _refuse_files(Path(data))
    return _open_folder(Path(data), split=split, size=size, strict=strict)


def is_shards(data: str) -> bool:
    """Tell whether a value of `--data` means WebDataset shards."""
    if is_remote(data) or ".tar" in Path(data).suffixes or data.endswith(".tgz"):
        return True
    folder = Path(data)
    if not folder.is_dir():
        return False
    # What downloads shards writes tables and lists beside them.
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return any(path.suffix == ".tar" for path in names) and not any(
        path.suffix.lower() in IMAGE_SUFFIXES or path.is_dir() for path in names
    )


def _refuse_files(path: Path) -> None:
    """Raise `ConfigError` for what is no folder of pictures, but is opened by another spelling."""
    if path.is_file() and is_table(path):
        raise ConfigError(f"{path} is a table of captions: give its folder, {path.parent}")
    if path.suffix == _PARQUET or (
        path.is_dir()
        and any(item.suffix == _PARQUET for item in path.iterdir())
        and not any(
            item.suffix.lower() in IMAGE_SUFFIXES or item.is_dir() for item in path.iterdir()
        )
    ):
        raise ConfigError(f"{path} is of Parquet files: give --data 'parquet:{path}'")


def _open_folder(folder: Path, *, split: Split, size: int, strict: bool) -> FolderSource:
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
    return FolderSource(
        folder, split=split, divide=not there, min_side=size, below=below, strict=strict
    )
