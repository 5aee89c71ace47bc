"""Find the image files of a folder, and account for everything else that lies in it."""

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.captions import beside_name, is_table
from edgeclip.runtime.inputs.images import IMAGE_SUFFIXES
from edgeclip.runtime.inputs.left_out import leave_out
from edgeclip.runtime.inputs.more_formats import MORE_SUFFIXES, why_unreadable


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
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist: give image files or folders")
        inside = list_images(path, strict=strict) if path.is_dir() else (path,)
        found.update(dict.fromkeys(inside))
    return tuple(found)


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
        why = "known suffixes are " + " ".join(sorted(IMAGE_SUFFIXES))
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
    items += [
        (path, "no image by its name")
        for path in found.others
        if beside_name(path) not in beside or path.suffix.lower() != ".txt"
        if not (path.parent == root and is_table(path))
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
