"""Rows by the hash of what they were computed from: appended, torn, damaged, of other settings."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.rows import RowFile, row_bytes
from edgeclip.runtime.errors import InputError

KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(9)]
ROWS = np.arange(54, dtype=np.float16).reshape(9, 2, 3)


def opened(path: Path, **other: Any) -> RowFile:
    how: dict[str, Any] = {"shape": (2, 3), "dtype": np.float16, "settings": {"model": "a"}}
    return RowFile(path, **{**how, **other}, mend="delete it")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.rows"
    with closing(opened(path)) as file:
        file.append(KEYS[:4], ROWS[:4])
        file.append(KEYS[4:6], ROWS[4:6])
    return path


def test_rows_come_back_in_any_order(path: Path) -> None:
    file = opened(path)
    assert (len(file), file.keys, file.row_shape) == (6, tuple(KEYS[:6]), (2, 3))
    assert KEYS[5] in file
    assert KEYS[6] not in file
    found = file.rows([KEYS[5], KEYS[0], KEYS[5]])
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, ROWS[[5, 0, 5]])
    assert file.rows([]).shape == (0, 2, 3)


def test_a_new_row_of_a_key_replaces_the_one_before(path: Path) -> None:
    with closing(opened(path)) as file:
        file.append(KEYS[:1], ROWS[8:])
        np.testing.assert_array_equal(file.rows(KEYS[:1]), ROWS[8:])
    np.testing.assert_array_equal(opened(path).rows(KEYS[:2]), ROWS[[8, 1]])


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "new")) as file:
        assert len(file) == 0
    assert not (tmp_path / "new").exists()


def test_size_is_told_beforehand(path: Path) -> None:
    header = path.read_bytes().index(b"\n") + 1
    assert path.stat().st_size == header + row_bytes(6, (2, 3), np.float16)


@pytest.mark.parametrize("lost", [1, 47, 48, 49])
def test_a_torn_end_costs_its_records_alone(path: Path, lost: int) -> None:
    path.write_bytes(path.read_bytes()[:-lost])
    whole = 6 - -(-lost // 48)
    assert opened(path).keys == tuple(KEYS[:whole])
    with closing(opened(path)) as file:
        file.append(KEYS[whole:], ROWS[whole:])
    np.testing.assert_array_equal(opened(path).rows(KEYS), ROWS)


def test_an_altered_record_is_missing(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-48 * 3 + 40] ^= 1
    path.write_bytes(content)
    with closing(opened(path)) as file:
        assert file.keys == (*KEYS[:3], *KEYS[4:6])
        file.append(KEYS[3:4], ROWS[3:4])
    np.testing.assert_array_equal(opened(path).rows(KEYS[:6]), ROWS[:6])


@pytest.mark.parametrize(
    "other", [{"shape": (3, 2)}, {"dtype": np.float32}, {"settings": {"model": "b"}}]
)
def test_other_settings(path: Path, other: dict[str, Any]) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"some\.rows is of other settings: delete it"):
        opened(path, **other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [0, 9])
def test_a_torn_first_line_costs_nothing(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with closing(opened(path)) as file:
        assert len(file) == 0
        file.append(KEYS, ROWS)
    np.testing.assert_array_equal(opened(path).rows(KEYS), ROWS)


@pytest.mark.parametrize("content", [b"{}\n", b"PK\3\4", b'{"kind": "edgeclip-rows-1"'])
def test_no_such_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"some\.rows is damaged: delete it"):
        opened(path)


LIMITED = """
import resource, sys
from contextlib import closing
from pathlib import Path
from tests.runtime.bundle.test_rows import KEYS, ROWS, opened
from edgeclip.runtime.errors import InputError
size = Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, size + 60))
with closing(opened(Path(sys.argv[1]))) as file:
    try:
        file.append(KEYS[6:], ROWS[6:])
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_a_full_disk_costs_no_row_of_before(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large; what it holds is kept, so make room and run" in done.stdout
    with closing(opened(path)) as file:
        np.testing.assert_array_equal(file.rows(KEYS[:6]), ROWS[:6])
        file.append(KEYS[6:], ROWS[6:])
    np.testing.assert_array_equal(opened(path).rows(KEYS), ROWS)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.runtime.bundle.test_rows import KEYS, ROWS, opened
file = opened(Path(sys.argv[1]))
file.append(KEYS[6:8], ROWS[6:8])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_costs_nothing_that_was_appended(path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(opened(path).rows(KEYS[:8]), ROWS[:8])


def test_one_process_appends_while_others_read(path: Path) -> None:
    reader, late = opened(path), opened(path)
    with closing(opened(path)) as file:
        file.append(KEYS[6:7], ROWS[6:7])
        with pytest.raises(InputError, match=r"another process of edgeclip writes .*some\.rows"):
            reader.append(KEYS[7:8], ROWS[7:8])
        np.testing.assert_array_equal(opened(path).rows(KEYS[:7]), ROWS[:7])
    with closing(late):  # it was opened before the others wrote
        late.append(KEYS[7:], ROWS[7:])
        np.testing.assert_array_equal(late.rows(KEYS), ROWS)
    np.testing.assert_array_equal(opened(path).rows(KEYS), ROWS)


def test_two_that_find_no_file_make_one(tmp_path: Path) -> None:
    path = tmp_path / "new.rows"
    first, second = opened(path), opened(path)
    with closing(first):
        first.append(KEYS[:2], ROWS[:2])
    with closing(second):
        second.append(KEYS[2:3], ROWS[2:3])
    np.testing.assert_array_equal(opened(path).rows(KEYS[:3]), ROWS[:3])


def test_keys_that_share_their_hash(tmp_path: Path) -> None:
    # What is held of each key is a hash of the sum of its words times odd factors.
    first, second = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)
    inverse = pow(second, -1, 2**64)
    keys = [np.array([a, -a * first * inverse % 2**64, 0, 0], "<u8").tobytes() for a in range(1, 5)]
    with closing(opened(tmp_path / "a")) as file:
        file.append(keys, ROWS[:4])
        file.append(keys[:1], ROWS[4:5])
        assert len(file) == 4
    file = opened(tmp_path / "a")
    assert len(file) == 4
    np.testing.assert_array_equal(file.rows(keys), ROWS[[4, 1, 2, 3]])


@pytest.mark.parametrize("place", [0, 8, 16, 24])
def test_numbered_keys_are_found_as_fast_as_hashes(tmp_path: Path, place: int) -> None:
    # Were they to share what is held in memory, each would be looked for among all of them.
    numbers = np.arange(20_000, dtype=">u8")
    keys = [bytes(place) + number.tobytes() + bytes(24 - place) for number in numbers]
    with closing(opened(tmp_path / "a", shape=(), dtype=np.int64)) as file:
        file.append(keys, numbers)
    file = opened(tmp_path / "a", shape=(), dtype=np.int64)
    reads = 0
    read = os.pread

    def counted(*args: int) -> bytes:
        nonlocal reads
        reads += 1
        return read(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "pread", counted)
        assert file.rows(keys[-50:]).tolist() == numbers[-50:].tolist()
    assert reads <= 200


@given(
    writes=st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=30),
    reopen=st.integers(1, 9),
)
def test_it_holds_what_a_dict_would(writes: list[list[int]], reopen: int) -> None:
    # Keys that share their first 8 bytes in groups of three, so that those are not enough.
    keys = [
        bytes([number // 3]) * 8 + hashlib.sha256(bytes([number])).digest()[8:]
        for number in range(41)
    ]
    held: dict[bytes, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "some.rows")
        file = opened(path, shape=(), dtype=np.float64)
        for count, write in enumerate(writes):
            given = {keys[number]: 100.0 * count + number for number in write}
            file.append(tuple(given), np.array(list(given.values())))
            held |= given
            if count % reopen == 0:
                file.close()
                file = opened(path, shape=(), dtype=np.float64)
        assert len(file) == len(held)
        assert set(file.keys) == set(held)
        assert [key in file for key in keys] == [key in held for key in keys]
        np.testing.assert_array_equal(file.rows(list(held)), list(held.values()))
        numbers = np.array([file.number(key) for key in held], np.int64)
        np.testing.assert_array_equal(file.at(numbers), list(held.values()))
        file.close()


def test_many_rows_take_no_memory(tmp_path: Path) -> None:
    count = 40_000
    numbers = np.arange(count, dtype="<u8")
    keys = [number.tobytes() + bytes(24) for number in numbers]
    tracemalloc.start()
    try:
        with closing(opened(tmp_path / "a", shape=(512,))) as file:
            for first in range(0, count, 1000):
                chunk = slice(first, first + 1000)
                file.append(keys[chunk], np.full((1000, 512), first // 1000, np.float16))
        before = tracemalloc.get_traced_memory()[0]
        again = opened(tmp_path / "a", shape=(512,))
        assert keys[0] in again
        assert tracemalloc.get_traced_memory()[0] - before < 2 * count
    finally:
        tracemalloc.stop()
    assert again.rows([keys[count - 1], keys[0]])[:, 0].tolist() == [39, 0]


def test_a_file_that_is_cut_while_it_is_read(path: Path) -> None:
    file = opened(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"some\.rows was altered while it was read: run"):
        file.at(np.array([5]))
