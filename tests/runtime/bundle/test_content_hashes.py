"""Hashes of files: the bytes decide, and what is known is not read again."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from edgeclip.runtime.bundle import files
from edgeclip.runtime.bundle.files import ContentHashes
from edgeclip.runtime.errors import InputError


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where hashes are kept."""
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    found: list[Path] = []

    def hashed(path: Path) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(files, "sha256_file", hashed)
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))  # no file is too young
    return found


def right(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def test_bytes_are_hashed_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert ContentHashes().of(path) == right(path)
    assert ContentHashes().of(path) == right(path)
    assert reads == [path]


def test_a_change_that_hides_is_found(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = path.stat()
    hashes = ContentHashes()
    hashes.of(path)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock of the disk ticks
        path.write_bytes(b"two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert hashes.of(path) == right(path) == hashlib.sha256(b"two").digest()


def test_a_touched_or_copied_file_has_the_hash_of_before(tmp_path: Path) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    hashes = ContentHashes()
    first = hashes.of(path)
    os.utime(path, (1, 1))
    shutil.copyfile(path, copy)
    assert hashes.of(path) == hashes.of(copy) == first


def test_a_young_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    os.utime(path, ns=(time.time_ns(),) * 2)
    hashes = ContentHashes()
    hashes.of(path)
    path.write_bytes(b"two")
    assert hashes.of(path) == right(path)


def test_names_that_are_not_utf8(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"one")
    assert ContentHashes().of(path) == ContentHashes().of(path) == right(path)
    assert len(reads) == 1


@pytest.mark.parametrize("damage", ["file", "garbage", "none"])
def test_without_a_place_to_keep_them(tmp_path: Path, kept: Path, damage: str) -> None:
    if damage == "file":
        kept.write_bytes(b"in the way")
    elif damage == "garbage":
        kept.mkdir()
        (kept / "content-hashes.sqlite").write_bytes(b"no database at all, but bytes" * 99)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert ContentHashes().of(path) == right(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone cannot be read: No such file"):
        ContentHashes().of(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        ContentHashes().of(tmp_path)
