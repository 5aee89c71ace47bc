"""Captions of a folder of images."""

from pathlib import Path

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.image_folder import read_captions


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "deep" / "b.png"]
    paths[1].parent.mkdir()
    for path in paths:
        path.touch()
    return paths


def write_table(folder: Path, text: str) -> None:
    (folder / "captions.csv").write_bytes(text.encode())


def test_none_at_all(tmp_path: Path, images: list[Path]) -> None:
    assert read_captions(tmp_path, images) is None


def test_text_files(tmp_path: Path, images: list[Path]) -> None:
    images[0].with_suffix(".txt").write_text(" a tree\n", encoding="utf-8")
    images[1].with_suffix(".txt").write_text("\ufeffein Bäumchen", encoding="utf-8")
    assert read_captions(tmp_path, images) == ("a tree", "ein Bäumchen")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_table(tmp_path: Path, images: list[Path], line_end: str, mark: str) -> None:
    rows = ["caption,other,file", '"red, and ""round""",1,deep/b.png', "a tree,2,a.png"]
    write_table(tmp_path, mark + line_end.join(rows) + line_end)
    assert read_captions(tmp_path, images) == ("a tree", 'red, and "round"')


def test_caption_over_two_lines(tmp_path: Path, images: list[Path]) -> None:
    write_table(tmp_path, 'file,caption\na.png,"one\ntwo"\ndeep/b.png,b\n')
    assert read_captions(tmp_path, images) == ("one\ntwo", "b")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "needs a header"),
        ("file;caption\na.png;a\n", "needs a header"),
        ("file,caption\na.png,a\n", r"1 of 2 images have no caption, the first is deep/b\.png"),
        ("file,caption\na.png,a\ndeep/b.png,\n", "have no caption"),
        ("file,caption\na.png,a\na.png,b\n", r"line 3: a\.png is listed twice"),
        ("file,caption\nc.png,a\n", r"line 2: c\.png is no image"),
        ("file,caption\n../a.png,a\n", "is no image"),
        ("file,caption\n,a\n", "is no image"),
        ('file,caption\na.png,a\ndeep/b.png,"b" or c\n', "from line 3 on: ',' expected"),
        ('file,caption\na.png,a\ndeep/b.png,"b\n', "from line 3 on: unexpected end"),
        ('file,caption\na.png,"a\n' + 9000 * "deep/b.png,some words\n", "from line 2 on: field"),
        ('file,"caption\n', "from line 1 on: unexpected end"),
    ],
)
def test_damaged_table(tmp_path: Path, images: list[Path], table: str, message: str) -> None:
    write_table(tmp_path, table)
    with pytest.raises(InputError, match=message):
        read_captions(tmp_path, images)


def test_table_that_is_not_text(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "captions.csv").write_bytes(b"file,caption\na.png,\xff\n")
    with pytest.raises(InputError, match="as UTF-8 text"):
        read_captions(tmp_path, images)
