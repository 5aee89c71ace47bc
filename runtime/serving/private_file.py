"""Secrets on disk: files that only their owner can read, from their first byte on."""

import os
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.files import atomic_file


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
