"""A list of pictures to keep: written, read, damaged, and held against sources."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.data.keep_list import KeepList, kept_rows, read_keep_list, write_keep_list
from edgeclip.compress.data.sources import FolderSource
from edgeclip.runtime.errors import InputError

ONE, TWO = "ab" * 32, "00" * 31 + "01"


def contents(
    source: FolderSource, *indices: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    rows = [bytes.fromhex(source.content(index)) for index in indices]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)


def test_what_is_written_is_read(source: FolderSource, tmp_path: Path) -> None:
    path = tmp_path / "keep.txt"
    write_keep_list(path, contents(source, 5, 2, 9), ["made by hand", "over\ntwo lines"])
    keep = read_keep_list(path)
    assert len(keep) == 3
    assert keep.comments == ("made by hand", "over\\ntwo lines")
    assert kept_rows(source, keep).tolist() == [2, 5, 9]


def test_a_list_may_be_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "keep.txt"
    path.write_bytes(f"\ufeff# mine\r\n\r\n{TWO.upper()} \r\n{ONE}\n  # {ONE}\n{ONE}".encode())
    keep = read_keep_list(path)
    assert [row.tobytes().hex() for row in keep.contents] == [TWO, ONE]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"# one\n{ONE}\n{ONE[:-1]}\n", "line 3: .* is not the content of a picture"),
        ("file,caption\na.jpg,a cat\n", "line 1: 'file,caption' is not"),
        (f"{ONE}{ONE}\n", "line 1"),
        ("# nothing\n", "lists no picture"),
        ("", "lists no picture"),
    ],
)
def test_anything_else_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keep.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        read_keep_list(path)


def test_a_list_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_keep_list(tmp_path / "nowhere.txt")
    (tmp_path / "keep.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_keep_list(tmp_path / "keep.txt")


def test_a_list_of_other_pictures_is_refused(source: FolderSource, tmp_path: Path) -> None:
    path = tmp_path / "keep.txt"
    path.write_text(f"# 1 of holidays are kept\n{ONE}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"none of the 20 pictures .* It says: 1 of holidays"):
        kept_rows(source, read_keep_list(path))


def test_of_equal_pictures_the_first_is_kept_and_unreadable_ones_are_not(
    source: FolderSource, few_pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keep.txt"
    write_keep_list(path, contents(source, 2, 4, 6), [])
    folder = shutil.copytree(few_pictures, tmp_path / "pictures")
    shutil.copy(folder / "0002.bmp", folder / "0011.bmp")
    copied = FolderSource(folder)
    (folder / "0004.bmp").unlink()
    assert kept_rows(copied, read_keep_list(path)).tolist() == [2, 6]
    assert "1 of the 3 pictures" in caplog.text


rows = st.lists(st.binary(min_size=32, max_size=32) | st.just(bytes(32)), max_size=20)


@given(rows.filter(len), rows)
def test_a_list_holds_what_is_on_it(listed: list[bytes], asked: list[bytes]) -> None:
    unique = np.frombuffer(b"".join(sorted(set(listed))), np.uint8).reshape(-1, 32)
    keep = KeepList(Path("keep.txt"), unique, ())
    given_rows = np.frombuffer(b"".join([*asked, *listed]), np.uint8).reshape(-1, 32)
    expected = [row in listed for row in [*asked, *listed]]
    assert keep.holds(given_rows).tolist() == expected
