"""Captions of a folder of images, in every form that people keep them in."""

import json
import unicodedata
from pathlib import Path

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.captions import read_annotations, read_captions
from edgeclip.runtime.inputs.find_images import forget_left_out, list_images, report_left_out

BOTH = (("one",), ("two",))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return touch(tmp_path, "a.png", "deep/b.png")


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def write_table(folder: Path, text: str, name: str = "captions.csv") -> None:
    (folder / name).write_bytes(text.encode())


def test_none_at_all(tmp_path: Path, images: list[Path]) -> None:
    assert read_captions(tmp_path, images) is None


def test_text_files(tmp_path: Path, images: list[Path]) -> None:
    images[0].with_suffix(".TXT").write_text(" a tree\n", encoding="utf-8")
    images[1].with_suffix(".txt").write_text("\ufeffein Bäumchen", encoding="utf-8")
    assert read_captions(tmp_path, images) == (("a tree",), ("ein Bäumchen",))


def test_text_files_with_a_caption_on_each_line(tmp_path: Path, images: list[Path]) -> None:
    for image in images:
        image.with_suffix(".txt").write_text("one\r\n\r\ntwo\u2028three\n", encoding="utf-8")
    assert read_captions(tmp_path, images) == (("one", "two\u2028three"),) * 2


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_table(tmp_path: Path, images: list[Path], line_end: str, encoding: str) -> None:
    rows = ["caption,other,file", '"red, and ""round""",1,deep/b.png', "a tree,2,a.png", ""]
    (tmp_path / "captions.csv").write_bytes(line_end.join(rows).encode(encoding))
    assert read_captions(tmp_path, images) == (("a tree",), ('red, and "round"',))


def test_caption_over_two_lines(tmp_path: Path, images: list[Path]) -> None:
    write_table(tmp_path, 'file,caption\na.png,"one\ntwo"\ndeep/b.png,b\n')
    assert read_captions(tmp_path, images) == (("one\ntwo",), ("b",))


def test_no_line_ends_inside_a_caption_but_the_three(tmp_path: Path, images: list[Path]) -> None:
    write_table(tmp_path, "file,caption\na.png,o\u2028n\u0085e\x0c!\ndeep/b.png,b\n")
    assert read_captions(tmp_path, images) == (("o\u2028n\u0085e\x0c!",), ("b",))


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("captions.csv", "File,Caption\na.png,one\ndeep/b.png,two\n"),
        ("Captions.CSV", "image,caption\na.png,one\ndeep/b.png,two\n"),
        ("captions.csv", "file, caption\na.png, one\ndeep/b.png, two\n"),
        ("captions.csv", 'file, caption\na.png, "one"\ndeep/b.png, two\n'),
        ("captions.csv", ",file,caption\n0,a.png,one\n1,deep/b.png,two\n"),
        ("captions.csv", "filepath\ttitle\na.png\tone\ndeep/b.png\ttwo\n"),
        ("captions.csv", "file;caption\na.png;one;;\ndeep/b.png;two;\n"),
        ("captions.csv", "sep=;\nFile Name;Text\na.png;one\ndeep/b.png;two\n"),
        (
            "captions.csv",
            "image_name| comment_number| comment\na.png| 0| one\ndeep/b.png| 0| two\n",
        ),
        ("captions.csv", "\n\nfile,caption\n\na.png,one\n  \n,\ndeep/b.png,two\n\n"),
        ("captions.tsv", "image_path\tcaption\na.png\tone\ndeep/b.png\ttwo\n"),
        ("captions.txt", "image,caption\na.png,one\ndeep/b.png,two\n"),
        ("captions.txt", "a.png\tone\ndeep/b.png\ttwo\n"),
        ("captions.csv", "file,caption\n./a.png,one\n.\\deep\\b.png,two\n"),
        ("captions.csv", "file,caption\nA.PNG,one\nDeep/B.png,two\n"),
        ("captions.csv", "file,caption\nphotos/a.png,one\nC:\\my\\photos\\deep\\b.png,two\n"),
        (
            "captions.jsonl",
            '{"file": "a.png", "caption": "one"}\n\n{"image": "deep/b.png", "text": "two"}',
        ),
        (
            "captions.json",
            '[{"file": "a.png", "caption": "one"}, {"image": "deep/b.png", "text": ["two"]}]',
        ),
        ("captions.json", '{"a.png": "one", "deep/b.png": ["two"]}'),
    ],
)
def test_the_forms_that_people_use(tmp_path: Path, name: str, table: str) -> None:
    folder = tmp_path / "photos"
    images = touch(folder, "a.png", "deep/b.png")
    write_table(folder, table, name)
    assert read_captions(folder, images) == BOTH


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("captions.csv", "file,caption\na.png,1\nb.png,3\na.png,2\n"),
        ("captions.csv", "file,caption_1,caption 2\na.png,1,2\nb.png,3,\n"),
        ("results.token", "a.png#0\t1\na.png#1\t2\nb.png#0\t3\n"),
        ("Flickr8k.token.txt", "a.png#0\t1\na.png#1\t2\nb.png#0\t3\n"),
        ("captions.txt", "image,caption\na.png,1\na.png,2\nb.png,3\n"),
        (
            "captions.jsonl",
            '{"file": "a.png", "captions": ["1", "2"]}\n{"file": "b.png", "raw": "3"}',
        ),
        (
            "captions_val2017.json",
            json.dumps(
                {
                    "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
                    "annotations": [
                        {"image_id": 7, "caption": "1"},
                        {"image_id": 9, "caption": "3"},
                        {"image_id": 7, "caption": "2\n"},
                    ],
                }
            ),
        ),
        (
            "dataset_flickr30k.json",
            json.dumps(
                {
                    "images": [
                        {
                            "filename": "a.png",
                            "filepath": "Images",
                            "sentences": [{"raw": "1"}, {"raw": "2"}],
                        },
                        {"filename": "b.png", "filepath": "Images", "sentences": [{"raw": "3"}]},
                    ]
                }
            ),
        ),
        (
            "dataset_coco.json",
            json.dumps(
                {
                    "images": [
                        {
                            "filename": "a.png",
                            "filepath": "val2014",
                            "sentences": [{"raw": "1"}, {"raw": "2"}],
                        },
                        {"filename": "b.png", "filepath": "val2014", "sentences": [{"raw": "3"}]},
                    ]
                }
            ),
        ),
    ],
)
def test_several_captions_of_an_image(tmp_path: Path, name: str, table: str) -> None:
    # The pictures of Flickr8k, Flickr30k and COCO lie in a folder beside the table.
    images = touch(tmp_path, "Images/a.png", "Images/b.png")
    write_table(tmp_path, table, name)
    assert read_captions(tmp_path, images) == (("1", "2"), ("3",))


@pytest.mark.parametrize("of_file", ["NFC", "NFD"])
@pytest.mark.parametrize("of_table", ["NFC", "NFD"])
def test_names_in_any_unicode_form(tmp_path: Path, of_file: str, of_table: str) -> None:
    name = "Bäume café.png"
    images = touch(tmp_path, unicodedata.normalize(of_file, name))  # type: ignore[arg-type]
    write_table(tmp_path, f"file,caption\n{unicodedata.normalize(of_table, name)},one\n")  # type: ignore[arg-type]
    assert read_captions(tmp_path, images) == (("one",),)


def test_names_that_mean_two_images(tmp_path: Path) -> None:
    images = touch(tmp_path, "x/a.png", "y/a.png")
    write_table(tmp_path, "file,caption\na.png,one\n")
    with pytest.raises(InputError, match=r"line 2: a\.png and the others could be in x/ or in y/"):
        read_captions(tmp_path, images)
    images = touch(tmp_path, "A.png", "a.PNG")
    write_table(tmp_path, "file,caption\na.png,one\n")
    with pytest.raises(InputError, match=r"line 2: a\.png may be 'A.png' or 'a.PNG'"):
        read_captions(tmp_path, images)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "line 1: needs a header"),
        ("a.png,a\n", "line 1: needs a header"),
        ("\n\nfile,label\na.png,a\n", "line 3: needs a header"),
        ("file,caption\n", "names no images"),
        ("file,caption\na.png,a\n", r"1 of 2 images have no caption, the first is deep/b\.png"),
        ("file,caption\na.png,a\ndeep/b.png,\n", r"line 3: deep/b\.png has an empty caption"),
        ("file,caption\nc.png,a\n", r"line 2: c\.png is no image"),
        ("file,caption\n../a.png,a\n", "is no image"),
        ("file,caption\n,a\n", "line 2:  is no image"),
        (
            "file,caption\na.png,red, round\ndeep/b.png,b\n",
            "line 2: 3 cells, where the header has 2",
        ),
        ("caption,file\n\nred, round,a.png\n", "line 3: 3 cells, where the header has 2"),
        ("file,caption\na.png\ndeep/b.png,b\n", "line 2: 1 cells?, where the header has 2"),
        ("file,caption,split\na.png,red, round\n", r"2: a\.png|1 of 2 images have no"),
        ("a.png#0\tone\ndeep/b.png one\n", "line 2: 0 TABs"),
        ('file,caption\na.png,a\ndeep/b.png,"b" or c\n', "from line 3 on: ',' expected"),
        ('file,caption\na.png,a\ndeep/b.png,"b\n', "from line 3 on: unexpected end"),
        ('file,caption\na.png,"a\n' + 9000 * "deep/b.png,some words\n", "from line 2 on: field"),
        ('file,"caption\n', "from line 1 on: unexpected end"),
    ],
)
def test_damaged_table(tmp_path: Path, images: list[Path], table: str, message: str) -> None:
    write_table(tmp_path, table)
    with pytest.raises(InputError, match=message) as failed:
        read_captions(tmp_path, images)
    assert "\n" not in str(failed.value)
    assert "captions.csv" in str(failed.value)


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("captions.jsonl", '{"file": "a.png", "caption": "one"}\n{"file": ', "line 2: Expecting"),
        ("captions.jsonl", '\n["a.png", "one"]', "line 2: needs an object"),
        ("captions.json", '[\n{"file": "a.png"\n', "line 3: Expecting"),
        ("captions.json", "[1]", "entry 1: needs an object"),
        ("captions.json", "7", "give a list"),
        ("captions.json", "[" * 100_000, "nested too deeply"),
        ("captions.json", '{"images": [{"id": 1}], "annotations": []}', "image 1: needs id and"),
        (
            "captions.json",
            '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
            "annotation 1: needs a caption",
        ),
        ("captions.json", '{"a.png": 7, "deep/b.png": "x"}', r"entry 1: a\.png has an empty"),
    ],
)
def test_damaged_json(
    tmp_path: Path, images: list[Path], name: str, table: str, message: str
) -> None:
    write_table(tmp_path, table, name)
    with pytest.raises(InputError, match=message) as failed:
        read_captions(tmp_path, images)
    assert name in str(failed.value)


def test_table_that_is_not_text(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "captions.csv").write_bytes(b"file,caption\na.png,\xff\n")
    with pytest.raises(InputError, match=r"captions\.csv, line 2: byte 0xFF is not UTF-8 text"):
        read_captions(tmp_path, images)


def test_other_captions_are_named(
    tmp_path: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path, "file,caption\na.png,one\ndeep/b.png,two\n")
    forget_left_out()
    write_table(tmp_path, "a.png\tother\n", "captions.txt")
    (tmp_path / "a.txt").write_text("another")
    assert read_captions(tmp_path, images) == BOTH
    report_left_out()
    (line,) = caplog.messages
    assert "left out 2 files: captions are read from captions.csv" in line
    assert "captions.txt" in line
    assert "a.txt" in line
    with pytest.raises(InputError, match="captions are read from"):
        read_captions(tmp_path, images, strict=True)


def test_a_picture_called_captions_keeps_its_text(tmp_path: Path) -> None:
    images = touch(tmp_path, "captions.png")
    (tmp_path / "captions.txt").write_text("a page of captions")
    assert read_captions(tmp_path, images) == (("a page of captions",),)


def test_rows_of_files_that_are_left_out_are_no_mistake(
    tmp_path: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    forget_left_out()
    touch(tmp_path, "c.mov")
    write_table(tmp_path, "file,caption\na.png,one\ndeep/b.png,two\nc.mov,three\n")
    assert read_captions(tmp_path, images) == BOTH
    annotations = {"images": [{"id": 1, "file_name": "gone.png"}], "annotations": []}
    annotations["images"] += [{"id": 2, "file_name": "a.png"}, {"id": 3, "file_name": "deep/b.png"}]
    annotations["annotations"] = [
        {"image_id": number, "caption": text} for number, text in ((1, "x"), (2, "one"), (3, "two"))
    ]
    (tmp_path / "captions.csv").unlink()
    write_table(tmp_path, json.dumps(annotations), "captions_all.json")
    assert read_captions(tmp_path, images) == BOTH
    report_left_out()
    assert "gone.png" in caplog.messages[0]
    with pytest.raises(InputError, match=r"gone\.png"):
        read_captions(tmp_path, images, strict=True)


def test_captions_of_some_images(tmp_path: Path, images: list[Path]) -> None:
    write_table(tmp_path, "file,caption\ndeep/b.png,two\n")
    assert read_annotations(tmp_path, images).captions == ((), ("two",))
    with pytest.raises(InputError, match=r"captions\.csv: 1 of 2 images have no caption"):
        read_captions(tmp_path, images)
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "a.txt").write_text("one")
    assert read_annotations(tmp_path, images).captions == (("one",), ())
    with pytest.raises(InputError, match=r"1 of 2 images have no caption, the first is deep"):
        read_captions(tmp_path, images)


def test_what_annotations_say_of_splits(tmp_path: Path) -> None:
    images = touch(tmp_path, "val2014/a.png", "val2014/b.png", "val2014/c.png")
    entries = [
        {"filename": f"{name}.png", "filepath": "val2014", "sentences": [{"raw": name}], **split}
        for name, split in (("a", {"split": "restval"}), ("b", {"split": 3}))
    ]
    write_table(tmp_path, json.dumps({"images": entries}), "dataset_coco.json")
    found = read_annotations(tmp_path, images)
    assert found.splits == ("restval", None, None)
    assert found.captions == (("a",), ("b",), ())


@pytest.mark.parametrize("folder", [".", "annotations"])
def test_annotations_of_several_splits(
    tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Karpathy's file goes before COCO's, which are read together."""
    images = touch(tmp_path, "train2017/a.png", "val2017/b.png")
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, name in (("train", "a"), ("val", "b"), ("train2014", "x")):
        table = {
            "images": [{"id": 1, "file_name": f"{name}.png"}],
            "annotations": [{"image_id": 1, "caption": f"{name} of {split}"}],
        }
        write_table(tmp_path / folder, json.dumps(table), f"captions_{split}.json")
    found = read_annotations(tmp_path, images)
    assert found.captions == (("a of train",), ("b of val",))
    assert found.splits == ("train", "val")
    forget_left_out()
    entries = [{"filename": "a.png", "filepath": "train2017", "sentences": [{"raw": "other"}]}]
    write_table(tmp_path / folder, json.dumps({"images": entries}), "dataset_coco.json")
    assert read_annotations(tmp_path, images).captions == (("other",), ())
    report_left_out()
    assert "left out 3 files: captions are read from dataset_coco.json" in caplog.text


def test_what_belongs_to_flickr8k_is_not_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_left_out()
    touch(tmp_path, "Flicker8k_Dataset/a.jpg")
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    (text / "Flickr8k.token.txt").write_text("a.jpg#0\tone\n")
    (text / "Flickr_8k.trainImages.txt").write_text("a.jpg\ngone.jpg\n")
    images = list_images(tmp_path)
    found = read_annotations(tmp_path, images)
    assert (found.captions, found.splits) == ((("one",),), ("train",))
    report_left_out()
    assert caplog.text == ""


@pytest.mark.parametrize("row", ["a.png one", "a.png| x| one", "| 0| one"])
def test_damaged_rows_of_flickr30k(tmp_path: Path, images: list[Path], row: str) -> None:
    write_table(tmp_path, f"image_name| comment_number| comment\n{row}\n", "results.csv")
    with pytest.raises(InputError, match=r"results\.csv, line 2: needs image_name\| comment_"):
        read_captions(tmp_path, images)


def test_a_table_that_names_no_image_here_is_told(tmp_path: Path, images: list[Path]) -> None:
    entries = [{"filename": "gone.jpg", "sentences": [{"raw": "a cat"}], "split": "train"}]
    write_table(tmp_path, json.dumps({"images": entries}), "dataset_coco.json")
    with pytest.raises(InputError, match="it names no images of the") as caught:
        read_captions(tmp_path, images)
    assert str(tmp_path / "dataset_coco.json") in str(caught.value)
