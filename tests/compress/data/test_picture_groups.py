"""Groups of pictures by a column of a table."""

from pathlib import Path

import pytest

from edgeclip.compress.data.picture_groups import read_groups
from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.runtime.errors import InputError


@pytest.fixture
def pictures(tmp_path: Path, few_pictures: Path) -> FolderSource:
    for name in ("a/one.bmp", "a/two.bmp", "b/two.bmp"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((few_pictures / "0000.bmp").read_bytes())
    return FolderSource(tmp_path / "pictures")


def names(source: FolderSource, table: Path, column: str = "where") -> list[str | None]:
    groups = read_groups(source, table, column)
    return [None if number < 0 else groups.names[number] for number in groups.number]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'picture,where\none.bmp,"sea, far"\n./a/two.bmp,land\nb\\two.bmp,\n'),
        ("t.tsv", "where\tpicture\nsea, far\ta/one.bmp\nland\ta/two.bmp\n"),
        ("t.jsonl", '{"x": "one.bmp", "where": "sea, far"}\n\n{"x": "a/two.bmp", "where": "land"}'),
    ],
)
def test_a_table_in_any_form(pictures: FolderSource, name: str, text: str) -> None:
    table = pictures.paths[0].parents[1] / name
    table.write_text(text, encoding="utf-8")
    assert names(pictures, table) == ["sea, far", "land", None]


def test_the_table_of_the_captions_is_taken(pictures: FolderSource) -> None:
    table = pictures.paths[0].parents[1] / "captions.csv"
    text = "file,caption,where\n" + "".join(
        f"{path.relative_to(table.parent)},a cat,{path.parent.name}\n" for path in pictures.paths
    )
    table.write_text(text, encoding="utf-8")
    groups = read_groups(FolderSource(table.parent), None, "where")
    assert (groups.names, groups.number.tolist()) == (("a", "b"), [0, 0, 1])


def test_a_table_above_the_folder_of_a_split_is_found(pictures: FolderSource) -> None:
    folder = pictures.paths[0].parents[1]
    (folder / "captions.csv").write_text("file,where\na/one.bmp,sea\n", encoding="utf-8")
    groups = read_groups(FolderSource(folder / "a"), None, "where")
    assert (groups.names, groups.number.tolist()) == (("sea",), [0, -1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,place\none.bmp,sea\n", "no column is called 'where': its header is file, place"),
        ("", "its header is empty"),
        ("file,where\nthree.bmp,sea\n", "names none of the 3 pictures, such as one.bmp"),
        ("file,where\ntwo.bmp,sea\n", "names none"),  # it may be either
        ("file,where\none.bmp,sea,far\n", "line 2: not as many cells"),
        ('file,where\none.bmp,"sea\n', "close every quote"),
    ],
)
def test_a_table_that_does_not_fit(pictures: FolderSource, text: str, says: str) -> None:
    table = pictures.paths[0].parents[1] / "t.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        read_groups(pictures, table, "where")


def test_no_table_or_no_folder(pictures: FolderSource) -> None:
    with pytest.raises(InputError, match="give one with --group-table"):
        read_groups(pictures, None, "where")
    with pytest.raises(InputError, match="only the pictures of a folder"):
        read_groups(EmojiSource("train", 4, size=32), None, "where")
