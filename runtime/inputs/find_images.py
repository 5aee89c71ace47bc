"""Find image files and embed them; account for what is left out and what cannot be read."""

import argparse
import fnmatch
import itertools
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.console import plain_text
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import (
    IMAGE_SUFFIXES,
    MORE_SUFFIXES,
    decode_image,
    why_unreadable,
)
from edgeclip.runtime.inputs.preprocess import crop_ahead
from edgeclip.runtime.spec import ImageSpec

_log = logging.getLogger(__name__)

TABLE_NAME = "captions.csv"
# Names of files that hold the captions of a whole folder, in any case; the first is taken.
TABLES = (
    *(TABLE_NAME, "captions.tsv", "captions.jsonl", "captions.json", "captions.txt"),
    *("*.token", "*.token.txt", "results.csv"),  # Flickr30k and Flickr8k
    *("dataset_*.json", "captions_*.json"),  # splits by Karpathy and Fei-Fei, COCO
)
# Subfolders that hold tables of the whole folder: of COCO, of Flickr8k.
_TABLE_FOLDERS = ("annotations", "*_text")
_SPLIT_LISTS = "*.*images.txt"  # Flickr8k's, of the pictures of each split

_NAMED_LEFT_OUT = 5  # files that the line names for each reason; `-v` names all
# By path, since several sources may open the same folder in one command.
_left_out_noted: dict[Path, str] = {}

_NAMED_BAD = 20  # skipped items that are named; -v names all
_NAMED_IN_ERROR = 5
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)(%?)")


@dataclass(slots=True)
class _Found:
    """What a walk through a folder meets: image files, other files, and what it cannot use."""

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    unusable: list[tuple[Path, str]] = field(default_factory=list)


def find_images(paths: Iterable[Path], *, strict: bool = False) -> tuple[Path, ...]:
    """List the image files at the given paths; a folder stands for all images under it.

    Raises:
        InputError: a path that does not exist, or see `list_images`.
    """
    found: dict[str, Path] = {}  # by place: a path may be given in two spellings
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist: give image files or folders")
        inside = list_images(path, strict=strict) if path.is_dir() else (path,)
        for item in inside:
            found.setdefault(os.path.abspath(item), item)
    return tuple(found.values())


def list_images(folder: str | Path, *, strict: bool = False) -> tuple[Path, ...]:
    """List the image files under a folder, at any depth, sorted by their path in it.

    Image files are known by their suffix, in any case. Linked files and folders are followed. All
    else is noted for `report_left_out`, but for caption files, and hidden files that are no images.

    Args:
        folder: the folder.
        strict: refuse a folder with anything that would be left out.

    Raises:
        InputError: not a folder, or no image in it, or see `strict`.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}: give a folder of images")
    found = _walk(root)
    images = [path for path in found.images if not why_unreadable(path.suffix)]
    if not images:
        why = "known suffixes are " + " ".join(sorted(IMAGE_SUFFIXES | MORE_SUFFIXES))
        if found.images:
            count, first = len(found.images), found.images[0]
            why = f"{first.name} is one of {count} {why_unreadable(first.suffix)}"
        raise InputError(f"{root} holds no images: {why}")
    leave_out(_left_out(root, found), strict=strict)
    return tuple(sorted(images, key=lambda path: path.relative_to(root).as_posix()))


def leave_out_others(
    folder: Path, used: Collection[str], reason: str, *, strict: bool = False
) -> None:
    """Note everything in a folder but what lies in its subfolders `used`.

    Raises:
        InputError: with `strict`, if there is anything.
    """
    found = _walk(folder, skipped=used)
    rest = [(path, reason) for path in (*found.images, *found.others)]
    leave_out(sorted([*rest, *found.unusable]), strict=strict)


def _left_out(root: Path, found: _Found) -> list[tuple[Path, str]]:
    items = [(path, why_unreadable(path.suffix) or "") for path in found.images]
    items = [item for item in items if item[1]] + found.unusable
    beside = {beside_name(path) for path in found.images}
    tables = {root, *table_folders(root)}
    items += [
        (path, "no image by its name")
        for path in found.others
        if beside_name(path) not in beside or path.suffix.lower() != ".txt"
        if not (path.parent in tables and (is_table(path) or _is_split_list(path)))
    ]
    return sorted(items, key=lambda item: item[0].as_posix())


def _walk(root: Path, *, skipped: Collection[str] = ()) -> _Found:
    found = _Found()
    # A folder waits with those above it: a link to one of them would never end.
    waiting = [(root, frozenset({_identity(root)}))]
    while waiting:
        folder, above = waiting.pop()
        for path, mode, problem in _entries(folder):
            if folder == root and path.name in skipped:
                continue
            known = _is_image(path.name)
            if path.name.startswith("."):
                if known or _holds_images(path):
                    found.unusable.append((path, "hidden"))
            elif mode is None:
                found.unusable.append((path, problem))
            elif stat.S_ISDIR(mode):
                here = _identity(path)
                if here in above:
                    found.unusable.append((path, "a link to a folder above it"))
                else:
                    waiting.append((path, above | {here}))
            elif not stat.S_ISREG(mode):
                found.unusable.append((path, "no regular file"))
            elif known:
                found.images.append(path)
            else:
                found.others.append(path)
    return found


def _entries(folder: Path) -> Iterator[tuple[Path, int | None, str]]:
    """Yield the entries of a folder with their mode, or None and the reason why it is unknown."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield folder, None, f"cannot be listed ({error.strerror})"
        return
    for name in names:
        path = folder / name
        try:
            yield path, path.stat().st_mode, ""
        except OSError as error:
            broken = path.is_symlink() and isinstance(error, FileNotFoundError)
            yield path, None, "a broken link" if broken else f"unusable ({error.strerror})"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | MORE_SUFFIXES


def _holds_images(folder: Path) -> bool:
    return any(_is_image(name) for _, _, files in os.walk(folder) for name in files)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def is_table(path: Path) -> bool:
    """Tell by its name whether a file holds the captions of the folder that it lies in."""
    return any(fnmatch.fnmatchcase(path.name.casefold(), name) for name in TABLES)


def _is_split_list(path: Path) -> bool:
    return fnmatch.fnmatchcase(path.name.casefold(), _SPLIT_LISTS)


def table_folders(folder: Path) -> tuple[Path, ...]:
    """Return the subfolders whose tables hold the captions of the folder itself."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if any(fnmatch.fnmatchcase(path.name.casefold(), name) for name in _TABLE_FOLDERS)
        and path.is_dir()
    )


def beside_name(path: Path) -> tuple[Path, str]:
    """Return what an image and the text file beside it have in common."""
    return path.parent, path.stem.casefold()


def leave_out(items: Sequence[tuple[Path, str]], *, strict: bool = False) -> None:
    """Note files, each with the reason why it is not used.

    Raises:
        InputError: with `strict`, if there are any.
    """
    if items and strict:
        raise InputError(f"{_describe_left_out(items)}; without --strict they are left out")
    for path, reason in items:
        _log.debug("left out: %s (%s)", plain_text(str(path)), reason)
    _left_out_noted.update(items)


def forget_left_out() -> None:
    """Begin a new account."""
    _left_out_noted.clear()


def report_left_out() -> None:
    """Log one line about all that was noted, if anything was, and forget it."""
    items = list(_left_out_noted.items())
    forget_left_out()
    if items:
        _log.warning("left out %s", _describe_left_out(items))


def _describe_left_out(items: Sequence[tuple[Path, str]]) -> str:
    by_reason: dict[str, list[Path]] = {}
    for path, reason in items:
        by_reason.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in by_reason.items():
        more = len(paths) - _NAMED_LEFT_OUT
        names = ", ".join(plain_text(str(path)) for path in paths[:_NAMED_LEFT_OUT])
        names += f" and {more} more (-v names all)" if more > 0 else ""
        parts.append(f"{reason}: {names}")
    count = "1 file" if len(items) == 1 else f"{len(items)} files"
    return f"{count}: {'; '.join(parts)}"


@dataclass(frozen=True, slots=True)
class MaxBad:
    """The most items that may be unreadable: a share of all, and a number allowed in any case.

    The default is 1%, or 5 in a set so small that 1% of it is less.
    """

    share: float = 0.01
    count: int = 5

    def allowed(self, total: int) -> int:
        """Return how many of `total` items may be unreadable."""
        return max(self.count, math.floor(self.share * total + 1e-9))


DEFAULT_MAX_BAD = MaxBad()


def parse_max_bad(text: str) -> MaxBad:
    """Convert the argument of `--max-bad`, such as 1% or 20, for argparse."""
    match = _LIMIT.fullmatch(text.strip())
    if match is None or (not match[2] and not match[1].isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share such as 1% nor a number such as 20"
        )
    if not match[2]:
        return MaxBad(share=0.0, count=int(match[1]))
    if float(match[1]) > 100:
        raise argparse.ArgumentTypeError(f"{text} is more than 100%")
    return MaxBad(share=float(match[1]) / 100, count=0)


def add_max_bad_option(parser: argparse.ArgumentParser) -> None:
    """Add `--max-bad`."""
    parser.add_argument(
        "--max-bad",
        type=parse_max_bad,
        default=DEFAULT_MAX_BAD,
        metavar="LIMIT",
        help="how many images may be unreadable, as a share such as 1%% or a number; they are "
        f"skipped and named (default: {100 * DEFAULT_MAX_BAD.share:g}%%, and always "
        f"{DEFAULT_MAX_BAD.count})",
    )


def report_bad(reasons: Sequence[str], total: int, limit: MaxBad | None) -> None:
    """Log the items that were skipped and their number.

    Args:
        reasons: what is wrong with each, beginning with its name.
        total: how many items there are, with these.
        limit: how many may be skipped; None for any number.

    Raises:
        InputError: more are unreadable than `limit` allows, or all are.
    """
    for reason in reasons[:_NAMED_BAD]:
        _log.info("skipped: %s", reason)
    for reason in reasons[_NAMED_BAD:]:
        _log.debug("skipped: %s", reason)
    if len(reasons) > _NAMED_BAD:
        _log.info("skipped: %d more, which -v names", len(reasons) - _NAMED_BAD)
    if reasons:
        _log.info("skipped %d of %d images", len(reasons), total)
    if reasons and len(reasons) == total:
        raise InputError(f"none of {total} images could be read; the first: {reasons[0]}")
    allowed = total if limit is None else limit.allowed(total)
    if len(reasons) > allowed:
        shown = "; ".join(reasons[:_NAMED_IN_ERROR])
        more = len(reasons) - _NAMED_IN_ERROR
        raise InputError(
            f"{len(reasons)} of {total} images cannot be read, and {allowed} are allowed: "
            f"{shown}{f'; and {more} more' if more > 0 else ''}. Mend or remove them, or allow "
            f"more with --max-bad {math.ceil(1000 * len(reasons) / total) / 10:g}%"
        )


def readable_images(
    paths: Sequence[Path], *, most: int | None = None, limit: MaxBad = DEFAULT_MAX_BAD
) -> tuple[Path, ...]:
    """Return the first `most` image files that can be decoded; the others are named and counted.

    Raises:
        InputError: more are unreadable than `limit` allows, or all.
    """
    kept: list[Path] = []
    bad: list[str] = []
    for path in paths:
        if most is not None and len(kept) >= most:
            break
        try:
            decode_image(path)
        except InputError as error:
            bad.append(str(error))
        else:
            kept.append(path)
    report_bad(bad, len(kept) + len(bad), limit)
    return tuple(kept)


@dataclass(frozen=True, slots=True)
class EmbeddedFiles:
    """Image files that were embedded, their embeddings float32 [N, dim], and files skipped.

    `skipped` holds (path, reason).
    """

    paths: tuple[Path, ...]
    embeddings: FloatArray
    skipped: tuple[tuple[Path, str], ...]


def embed_files(
    encode: Callable[[NDArray[np.uint8]], FloatArray],
    spec: ImageSpec,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    threads: int = 1,
    strict: bool = False,
) -> EmbeddedFiles:
    """Embed image files, skipping those that cannot be read; shows a progress bar on stderr.

    Args:
        encode: the image tower, pixels uint8 [N, size, size, 3] -> float32 [N, dim].
        spec: how it wants its pixels.
        paths: the files.
        batch_size: how many are embedded at a time.
        threads: how many decode meanwhile, see `crop_ahead`.
        strict: stop at the first that cannot be read.

    Raises:
        InputError: with `strict`, the first file that cannot be read; else only if none can.
        EngineError: the engine failed.
    """
    kept: list[Path] = []
    parts: list[FloatArray] = []
    skipped: list[tuple[Path, str]] = []
    crops = crop_ahead(paths, spec, threads=threads, ahead=batch_size)
    with tqdm(total=len(paths), desc="embed", unit="image", file=sys.stderr) as bar:
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            pixels = []
            for path, crop in zip(chunk, itertools.islice(crops, len(chunk)), strict=True):
                if not isinstance(crop, InputError):
                    pixels.append(crop)
                    kept.append(path)
                elif strict:
                    raise crop
                else:
                    skipped.append((path, str(crop)))
            if pixels:
                parts.append(encode(np.stack(pixels)))
            bar.update(len(chunk))
    if not parts:
        raise InputError(f"none of {len(paths)} images could be read; the first: {skipped[0][1]}")
    return EmbeddedFiles(tuple(kept), np.concatenate(parts), tuple(skipped))


def report_skipped(embedded: EmbeddedFiles, limit: MaxBad | None = None) -> None:
    """Log the skipped files with the reasons, and their number.

    Raises:
        InputError: more were skipped than `limit` allows; None allows any number.
    """
    reasons = [reason for _, reason in embedded.skipped]
    report_bad(reasons, len(embedded.paths) + len(reasons), limit)
