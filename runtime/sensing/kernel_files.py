"""Reading what a kernel tells in /proc and /sys: short files, any of which may be missing."""

from pathlib import Path


def read_line(path: Path) -> str | None:
    """What `path` says, without blanks around it; None where it cannot be read, or is empty.

    A sensor whose chip sleeps fails with some `OSError` when it is read, though its file is there.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The whole number that `path` holds; None where it holds none."""
    try:
        return int(read_line(path) or "")
    except ValueError:
        return None


def listing(folder: Path, pattern: str) -> list[Path]:
    """Paths in `folder` that match a glob pattern, in the order of the numbers in their names."""
    try:
        found = list(folder.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name))
