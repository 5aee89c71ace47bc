import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.errors import InputError

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
    with pytest.raises(InputError, match="kind 'other-1', expected 'test-1'"):
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
    with pytest.raises(InputError, match="comes twice"):
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
