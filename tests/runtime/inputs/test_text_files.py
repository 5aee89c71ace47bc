"""Text files as other programs write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.text_files import read_lines, read_text, split_lines

ODD = "a\u2028b\u0085c\x0cd\x1ce\u2029f"  # what str.splitlines would split at


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_end(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(end.join(["zwei Bäume", ODD, "a\ttab", ""]).encode(encoding))
    assert read_lines(path) == ["zwei Bäume", ODD, "a\ttab"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("file,caption\na.png,Bäume\n".encode(encoding))
    assert read_text(path) == "file,caption\na.png,Bäume\n"


@given(st.lists(st.text(st.characters(exclude_characters="\r\n")), min_size=1))
def test_row_i_is_line_i(lines: list[str]) -> None:
    for end in ("\n", "\r\n", "\r"):
        assert split_lines("".join(line + end for line in lines)) == lines


def test_repeated_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("cat\ndog\ncat\n\n \n")
    assert read_lines(path) == ["cat", "dog", "cat"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no texts"),
        (b"\n \n", "holds no texts"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        ("cat\r\nsoufflé".encode("cp1252"), "line 2: byte 0xE9 is not UTF-8"),
        (b"cat\ndog\rco\0w\n", "line 3: a NUL character"),
        (b"\xff\xfec\0a", "line 1"),  # half a character of UTF-16
    ],
)
def test_what_is_no_text_is_refused_with_its_line(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as failed:
        read_lines(path)
    assert str(path) in str(failed.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.txt: No such file"):
        read_text(tmp_path / "nowhere.txt")
