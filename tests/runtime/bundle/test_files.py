"""Atomic files, npz archives and JSON records: round trips, damage, interrupted writes."""

import errno
import hashlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeclip.runtime.bundle.files import (
    JsonRecord,
    atomic_directory,
    atomic_file,
    read_npz,
    sha256_file,
    write_npz,
)
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.stats.interval import Interval

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


META = frozenset({"names"})
ARRAYS = frozenset({"values"})
NAMES = ["a", "trailing null\0", "ünïcode 🍎", "", "x" * 200]


def write(path: Path, **changes: Any) -> None:
    values = changes.get("values", np.arange(6, dtype=np.float32).reshape(2, 3))
    write_npz(path, changes.get("kind", "test-1"), {"names": NAMES}, {"values": values})


def read(path: Path) -> Any:
    return read_npz(path, "test-1", META, ARRAYS)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.npz"
    write(path)
    meta, arrays = read(path)
    assert meta == {"names": NAMES}
    assert arrays["values"].dtype == np.float32
    assert arrays["values"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [entry.name for entry in path.parent.iterdir()] == ["file.npz"]


def test_the_same_data_makes_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.npz"
    write(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="No space left"):
        write(path, values=np.zeros((9, 9)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.npz"]


def test_objects_are_never_written_or_read(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(ValueError, match="numeric"):
        write(path, values=np.array([{}], dtype=object))
    meta = np.frombuffer(json.dumps({"kind": "test-1", "names": []}).encode(), np.uint8)
    np.savez(path, meta=meta, values=np.array([print], dtype=object))
    with pytest.raises(InputError, match="damaged"):
        read(path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(InputError, match="does not exist"):
        read(path)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(InputError, match="damaged or not EdgeCLIP's"):
        read(path)
    np.savez(path, values=np.zeros(3))
    with pytest.raises(InputError, match="damaged or not EdgeCLIP's"):
        read(path)
    write(path, kind="other-1")
    with pytest.raises(InputError, match="kind 'other-1', and 'test-1' is needed"):
        read(path)


def test_foreign_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    write_npz(path, "test-1", {"names": [], "more": 1}, {"values": np.zeros(2)})
    with pytest.raises(InputError, match=r"missing keys \[\], unknown keys \['more'\]"):
        read(path)
    write_npz(path, "test-1", {"names": []}, {"other": np.zeros(2)})
    with pytest.raises(InputError, match=r"missing keys \['values'\], unknown keys \['other'\]"):
        read(path)


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, values=np.zeros(1000))
    with pytest.raises(InputError, match="unexpected entry"):
        read(path)


def test_an_entry_longer_than_its_array_is_refused(tmp_path: Path) -> None:
    path, longer = tmp_path / "file.npz", tmp_path / "longer.npz"
    write(path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(longer, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + b"more")
    with pytest.raises(InputError, match="longer than its array"):
        read(longer)


def test_twice_the_same_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    write(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("values.npy", b"")
    with pytest.raises(InputError, match="occurs twice"):
        read(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"file\.npz is damaged"):
        read(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_or_changes_nothing(
    place: float, bit: int, tmp_path: Path
) -> None:
    path = tmp_path / "file.npz"
    write(path)
    expected_meta, expected = read(path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        meta, arrays = read(path)
    except InputError:
        return
    assert meta == expected_meta
    assert np.array_equal(arrays["values"], expected["values"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather(JsonRecord):
    SCHEMA_VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "weather"
    HINT: ClassVar[str] = "look out of the window"

    place: str
    degrees: tuple[float, ...] = ()


MADE = Weather(place="Zürich", degrees=(1.5, -2.0))
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(place=st.text(), degrees=st.lists(finite).map(tuple))
def test_a_round_trip_gives_an_equal_record(place: str, degrees: tuple[float, ...]) -> None:
    made = Weather(place=place, degrees=degrees)
    assert Weather.from_json(made.to_json(), source="x") == made


def test_a_file_says_its_schema_first(tmp_path: Path) -> None:
    path = tmp_path / "weather.json"
    MADE.save(path)
    assert next(iter(json.loads(path.read_text(encoding="utf-8")))) == "schema_version"
    assert Weather.load(path) == MADE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "schema None of weather is not 3: look out of the window"),
        ('{"schema_version": 2, "place": "x"}', "schema 2 of weather is not 3"),
        ('{"schema_version": true, "place": "x"}', "schema True of weather"),
        ('{"schema_version": 3, "place": 5}', "place: "),
        ('{"schema_version": 3, "place": "x", "wind": 1}', "wind: unknown key"),
    ],
)
def test_damage_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Weather.from_json(text, source="here")


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Weather(place="x", degrees=(float("nan"),)).to_json()


def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Weather.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        Weather.load(tmp_path / "binary.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(JsonRecord):
    WHAT: ClassVar[str] = "a measured value"
    HINT: ClassVar[str] = "measure again"

    found: Interval
    others: tuple[Interval, ...] = ()


def test_an_end_that_is_not_known_is_null_in_json() -> None:
    made = Measured(
        found=Interval(1.0, 0.5, math.inf), others=(Interval(0.0, -math.inf, math.inf),)
    )
    text = made.to_json()
    assert "Infinity" not in text
    assert json.loads(text)["found"] == {"value": 1.0, "low": 0.5, "high": None}
    assert Measured.from_json(text, source="x") == made
    with pytest.raises(ConfigError, match=r"found\.value: input should be a valid number"):
        Measured.from_json(text.replace("1.0", "null"), source="x")
