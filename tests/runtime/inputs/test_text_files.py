"""Text files as other programs write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.text_files import (
    labels_file,
    read_label_file,
    read_lines,
    read_text,
    split_lines,
    split_names,
)

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


def test_a_file_of_that_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("labels.txt", "places", "a,b"):
        Path(name).write_text("\ufeffWashington, D.C.\r\n\r\nsalt\u2028water\r\n", encoding="utf-8")
        file = labels_file(name)
        assert file == Path(name)
        assert read_label_file(file) == ("Washington, D.C.", "salt\u2028water")
    assert labels_file("cat,dog") is None
    assert labels_file("AC/DC") is None
    assert labels_file("x" * 9999) is None
    Path("cat").mkdir()
    assert labels_file("cat") is None


@pytest.mark.parametrize("name", ["missing.txt", "missing.csv", "deep/missing.TXT"])
def test_a_file_that_is_missing_is_no_label(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} does not exist"):
        labels_file(name)


def test_a_folder_is_no_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        labels_file(str(tmp_path))


def test_labels_of_other_programs(tmp_path: Path) -> None:
    for name, text in (
        ("labels.csv", '"Washington, D.C."\r\n\r\neagle\r\n'),
        ("labels.json", '["Washington, D.C.", "eagle"]'),
    ):
        (tmp_path / name).write_text(text)
        assert read_label_file(tmp_path / name) == ("Washington, D.C.", "eagle")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.txt", "\n\n", "holds no labels"),
        ("labels.txt", "cat\ndog\n\n cat\n", "line 4: the label 'cat' stands on line 1 too"),
        ("labels.txt", "\ncat, dog, owl\n", "line 2: one label, 'cat, dog, owl'"),
        ("labels.csv", "owl\ncat,dog\n", "line 2: 2 cells: write one label on each line"),
        ("labels.json", '["cat",\n', "line 2: no JSON"),
        ("labels.json", '{"cat": 0}', "line 1: give a list"),
        ("labels.yaml", "- cat\n", "is no text file of labels"),
    ],
)
def test_files_that_are_no_labels(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_label_file(path)


def test_a_name_in_quotes_may_hold_a_comma() -> None:
    assert split_names('"Washington, D.C.", eagle') == ("Washington, D.C.", "eagle")
    assert split_names("5\" pipe, o'clock") == ('5" pipe', "o'clock")


@pytest.mark.parametrize("given", ["", "a,,b", " , a", '"a', "a,\n"])
def test_names_that_cannot_be_split(given: str) -> None:
    with pytest.raises(InputError, match=r"empty name|cannot be split"):
        split_names(given)
