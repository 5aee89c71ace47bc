"""What a manifest says of the files beside it."""

from pathlib import Path

from edgeclip.runtime.files import sha256_file
from edgeclip.runtime.manifest import FileRecord


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Path, size and hash of every file in a folder and its subfolders, sorted."""
    return tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
