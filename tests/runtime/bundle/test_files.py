import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.files import atomic_directory, atomic_file, sha256_file
from edgeclip.runtime.errors import InputError

MARKER = "edgeclip.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_whole(target: Path, text: str, *, replace: bool = False) -> None:
    with atomic_directory(target, replace=replace) as folder:
        (folder / MARKER).write_text(text)
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model").write_text(text)


@given(st.binary(max_size=5000))
def test_hash_is_sha256(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_file_appears_whole_and_keeps_its_suffix(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.npz"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".npz"
        assert temporary.parent == target.parent
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.npz"]


def test_file_is_replaced_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def fail_midway() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a"]
    with atomic_file(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_file_cannot_take_the_place_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"), atomic_file(tmp_path):
        pass


def test_a_parent_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), atomic_file(tmp_path / "file" / "a"):
        pass


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with atomic_directory(target) as folder:
        (folder / MARKER).write_text("1")
        assert not target.exists()
    assert names(target) == [MARKER]
    assert names(target.parent) == ["bundle"]


def test_directory_may_take_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_whole(tmp_path / "bundle", "1")
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == [MARKER, "onnx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failed_directory_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    write_whole(tmp_path / "bundle", "old")

    def fail_midway() -> None:
        with atomic_directory(tmp_path / "bundle", replace=True) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(error):
        fail_midway()
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / MARKER).read_text() == "old"


def test_existing_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_whole(target, "old")
    with pytest.raises(InputError, match="exists: choose another name"):
        write_whole(target, "new")
    write_whole(target, "new", replace=True)
    assert (target / "onnx" / "model").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def test_directory_without_the_marker_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no edgeclip\.json"):
        write_whole(home, "new", replace=True)
    assert names(home) == ["diary.txt"]


def test_file_or_link_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("file", "link"):
        with pytest.raises(InputError, match="is not a directory"):
            write_whole(tmp_path / name, "new", replace=True)


def test_a_directory_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def write_beside_another() -> None:
        with atomic_directory(target) as folder:
            (folder / MARKER).write_text("mine")
            target.mkdir()
            (target / MARKER).write_text("theirs")

    with pytest.raises(InputError, match="exists"):
        write_beside_another()
    assert (target / MARKER).read_text() == "theirs"
    assert names(tmp_path) == ["bundle"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edgeclip.runtime.bundle import files
target, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "between":
    # The old directory was set aside, the new one is not in place yet.
    first = Path.replace
    def replace(self, other):
        if self.name.startswith(".edgeclip-tmp"):
            die()
        return first(self, other)
    Path.replace = replace
with files.atomic_directory(target, replace=True) as folder:
    (folder / "edgeclip.json").write_text("new")
    if when == "writing":
        die()
if when == "deleting":
    die()
"""


def kill_a_writer(target: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("existed", [False, True])
def test_writer_killed_midway_leaves_only_a_sibling_that_the_next_clears(
    tmp_path: Path, existed: bool
) -> None:
    target = tmp_path / "bundle"
    if existed:
        write_whole(target, "old")
    kill_a_writer(target, "writing")
    left = [name for name in names(tmp_path) if name != "bundle"]
    assert len(left) == 1
    assert left[0].startswith(".edgeclip-tmp-")
    assert left[0].endswith(".bundle")
    assert target.exists() == existed
    if existed:
        assert (target / MARKER).read_text() == "old"
    write_whole(target, "next", replace=True)
    assert names(tmp_path) == ["bundle"]


def test_writer_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_whole(target, "old")
    kill_a_writer(target, "between")
    assert not target.exists()
    with pytest.raises(InputError, match="exists"):
        write_whole(target, "next")
    assert (target / MARKER).read_text() == "old"
    write_whole(target, "next", replace=True)
    assert (target / MARKER).read_text() == "next"
    assert names(tmp_path) == ["bundle"]


def test_siblings_of_other_targets_and_of_living_writers_are_let_be(tmp_path: Path) -> None:
    living = tmp_path / f".edgeclip-tmp-{os.getppid()}-00000000.bundle"
    other = tmp_path / ".edgeclip-tmp-999999999-00000000.other.bundle"
    for folder in (living, other):
        folder.mkdir()
    write_whole(tmp_path / "bundle", "1")
    assert names(tmp_path) == sorted([living.name, other.name, "bundle"])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_file_system_that_cannot_flush_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "no flush")

    monkeypatch.setattr(os, "fsync", flush)
    if code == errno.EIO:
        with pytest.raises(OSError, match="no flush"):
            write_whole(tmp_path / "bundle", "1")
    else:
        write_whole(tmp_path / "bundle", "1")
        assert (tmp_path / "bundle" / MARKER).read_text() == "1"


def test_file_that_cannot_be_flushed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no flush")

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="no flush"), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("1")


def test_writer_does_not_clear_another_of_its_process(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target, replace=True) as first:
        (first / MARKER).write_text("first")
        write_whole(target, "second")
        assert (first / MARKER).is_file()
    assert (target / MARKER).read_text() == "first"
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("first")
        with atomic_file(tmp_path / "a") as other:
            other.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a", "bundle"]


def test_what_an_earlier_process_of_this_id_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / f".edgeclip-tmp-{os.getpid()}-00000000.bundle").mkdir()
    write_whole(tmp_path / "bundle", "1")
    assert names(tmp_path) == ["bundle"]


def test_two_threads_write_two_targets_side_by_side(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=write_whole, args=(tmp_path / str(number), str(number)))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / str(n) / MARKER).read_text() for n in range(4)] == list("0123")
