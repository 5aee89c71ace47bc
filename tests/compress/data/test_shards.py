import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from edgeclip.compress.data import shard_index, shards
from edgeclip.compress.data.emoji_scenes import split_of
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.shard_index import BLOCK
from edgeclip.compress.data.shards import (
    MOST_JUDGED,
    ShardSource,
    expand_braces,
    find_shards,
    judged,
    open_shards,
)
from edgeclip.compress.data.sources import EmojiSource, FolderSource, most_captions, without
from edgeclip.runtime.errors import ConfigError, InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(number: int, size: tuple[int, int] = (12, 9)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(held, "JPEG")
    return held.getvalue()


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = [
        {"__key__": f"{number:05d}", "jpg": jpeg(number), "txt": f"picture {number}"}
        for number in range(30)
    ]
    return write_samples(tmp_path / "a.tar", samples)


def test_the_samples_of_webdataset(tmp_path: Path) -> None:
    """Whatever its writer writes and its reader reads."""
    samples: list[dict[str, Any]] = [
        {"__key__": "a/0", "jpg": jpeg(0), "txt": "a tree"},
        {"__key__": "a/1", "json": {"caption": "from json", "width": 3}, "png": jpeg(1)},
        {"__key__": "b/0", "jpg": jpeg(2)},
        {"__key__": "b/1", "txt": "no picture"},
        {"__key__": "b/2.x", "image.jpg": jpeg(3), "caption": "a\nlong  line "},
        {"__key__": "ü" * 90, "webp": jpeg(4), "0.txt": "one", "1.txt": "two"},
        {"__key__": "e", "jpg": jpeg(5), "txt": "text first", "json": {"caption": "c", "text": 1}},
    ]
    path = tmp_path / "some.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(
                {
                    name: value
                    if name == "__key__" or isinstance(value, bytes)
                    else (json.dumps(value) if isinstance(value, dict) else value).encode()
                    for name, value in sample.items()
                }
            )
    source = ShardSource([path])
    read = webdataset.WebDataset(str(path), shardshuffle=False)
    theirs = [
        next(
            data
            for name, data in sample.items()
            if isinstance(data, bytes) and data[:2] == b"\xff\xd8"
        )
        for sample in read
        if any(str(name).endswith(("jpg", "png", "webp")) for name in sample)
    ]
    assert len(source) == len(theirs) == 6
    for index, data in enumerate(theirs):
        assert source[index].image.tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert [source.captions(index) for index in range(6)] == [
        ("a tree",),
        ("from json",),
        (),
        ("a long line",),
        ("one", "two"),
        ("text first",),
    ]
    assert (source.has_captions, most_captions(source)) == (True, 2)
    assert source[4].caption == source.caption(4) == "one"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_form(tmp_path: Path, form: int) -> None:
    long = "folder/" * 14 + "name" * 20 if form != tarfile.USTAR_FORMAT else "f/" * 60 + "n" * 90
    members = [
        ("./plain.jpg", jpeg(0)),
        ("./plain.txt", b"plain"),
        (f"{long}.jpg", jpeg(1)),
        (f"{long}.txt", b"long"),
        ("b\u00e4ume.jpg", jpeg(2)),
        ("b\u00e4ume.txt", "B\u00e4ume".encode()),
        ("empty.txt", b""),
    ]
    path = write_tar(tmp_path / "a.tar", members, form)
    source = ShardSource([path])
    assert [source.caption(index) for index in range(len(source))] == ["plain", "long", "Bäume"]
    for index in range(3):
        expected = Image.open(io.BytesIO(members[2 * index][1])).tobytes()
        assert source[index].image.tobytes() == expected


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        for name in ("a.jpg", "__notes__.json", ".hidden", "README"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(0))
            archive.addfile(info, io.BytesIO(jpeg(0)))
    assert len(ShardSource([path])) == 1


@given(
    st.lists(
        st.tuples(
            st.text("abc./_é0", min_size=1, max_size=12),
            st.sampled_from(["jpg", "png", "txt", "json", "JPG", "cls", "x.jpg", ""]),
            st.integers(0, 1500),
        ),
        max_size=12,
    )
)
def test_offsets_are_those_of_tarfile(members: list[tuple[str, str, int]]) -> None:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for stem, suffix, size in members:
            info = tarfile.TarInfo(f"{stem}.{suffix}")
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    path = Path(os.environ["EDGECLIP_CACHE"]).with_name("fuzzed.tar")
    path.write_bytes(held.getvalue())
    found = [
        (m.name.decode(), m.offset, m.size)
        for m in shard_index._members(shard_index.OpenFile(path), path)
    ]
    with tarfile.open(path) as archive:
        assert found == [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


def test_splits_are_by_key(shard: Path) -> None:
    parts = {}
    for split in ("train", "calibration", "test"):
        source = ShardSource([shard], split=split)
        assert source.split == split
        parts[split] = [str(source.caption(index)) for index in range(len(source))]
    for split, captions in parts.items():
        assert {split_of(f"{int(text.split()[1]):05d}") for text in captions} == {split}
    assert sum(map(len, parts.values())) == len(ShardSource([shard])) == 30
    with pytest.raises(ConfigError, match=r"none of the 30 samples in .* falls to unseen"):
        ShardSource([shard], split="unseen")


def test_a_picture_is_the_same_as_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(jpeg(3, (900, 700)))
    folder = FolderSource(tmp_path / "folder", min_side=32)
    packed = ShardSource(
        [write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(3, (900, 700)))])], min_side=32
    )
    assert packed.content(0) == folder.content(0)
    assert packed[0].image.tobytes() == folder[0].image.tobytes()
    assert packed[0].image.size == (225, 175)


def test_several_shards(tmp_path: Path) -> None:
    for number in range(12):
        members = [(f"{number}-{item}.jpg", jpeg(16 * number + item)) for item in range(number % 3)]
        write_tar(tmp_path / f"{number:03d}.tar", members)
    source = open_source(str(tmp_path), split="train", count=1, size=8)
    assert len(source) == len(open_shards(f"{tmp_path}/*.tar", split="train", size=8))
    whole = ShardSource(find_shards(f"{tmp_path}/{{000..011}}.tar"))
    assert len(whole) == sum(number % 3 for number in range(12))
    red = [
        round(float(np.asarray(whole[index].image)[..., 0].mean())) for index in range(len(whole))
    ]
    wanted = [16 * number + item for number in range(12) for item in range(number % 3)]
    assert np.abs(np.array(red) - wanted).max() <= 2
    backwards = ShardSource(find_shards(f"{tmp_path}/{{011..000}}.tar"))
    assert backwards.identity != whole.identity


def test_many_shards_are_indexed_by_several_processes(tmp_path: Path) -> None:
    paths = [
        write_tar(
            tmp_path / f"{n:03d}.tar",
            [(f"{n}-{k}.jpg", jpeg(n)) for k in range(3)] + [(f"{n}-{0}.txt", b"x")][: n % 2],
        )
        for n in range(24)
    ]
    whole = ShardSource(paths)
    parts = [ShardSource([path]) for path in paths]
    assert [whole.content(index) for index in range(72)] == [
        part.content(index) for part in parts for index in range(3)
    ]
    paths[20].write_bytes(b"<html>" * 200)
    with pytest.raises(InputError, match=r"020\.tar is no tar file"):
        ShardSource(paths)


class TestIndex:
    def test_it_is_made_once(
        self, shard: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = ShardSource([shard])
        (folder,) = (own_cache / "shard-index").iterdir()
        monkeypatch.setattr(shard_index, "_scan", lambda path: pytest.fail("read again"))
        again = ShardSource([shard])
        assert again.identity == first.identity
        assert again[7].image.tobytes() == first[7].image.tobytes()
        assert again.captions(7) == ("picture 7",)
        assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}

    @pytest.mark.parametrize("what", ["size", "time", "name"])
    def test_a_changed_shard_is_read_again(self, shard: Path, what: str) -> None:
        first = ShardSource([shard])
        if what == "size":
            shard = write_tar(shard, [("x.jpg", jpeg(1)), ("x.txt", b"other")])
            changed = ShardSource([shard])
            assert (changed.caption(0), len(changed)) == ("other", 1)
            assert changed.identity != first.identity
        elif what == "time":
            os.utime(shard, ns=(1, 1))
            assert ShardSource([shard]).identity == first.identity
        else:
            moved = shard.rename(shard.with_name("b.tar"))
            assert ShardSource([moved]).identity == first.identity

    def test_the_identity_names_what_a_picture_is_read_as(self, shard: Path) -> None:
        sources = [
            ShardSource([shard]),
            ShardSource([shard], min_side=8),
            ShardSource([shard], split="train"),
            ShardSource([shard, shard]),
            without(ShardSource([shard]), [3]),
        ]
        assert len({source.identity for source in sources}) == len(sources)

    @pytest.mark.parametrize("damage", ["cut", "no json", "text"])
    def test_a_damaged_index_is_made_again(self, shard: Path, own_cache: Path, damage: str) -> None:
        first = ShardSource([shard])
        (folder,) = (own_cache / "shard-index").iterdir()
        if damage == "cut":
            path = folder / "offset.npy"
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "no json":
            (folder / "index.json").unlink()
        else:
            (folder / "index.json").write_text("<html>")
        again = ShardSource([shard])
        assert again.identity == first.identity
        assert again.caption(29) == "picture 29"

    def test_without_a_place_to_keep_it(
        self, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "file"))
        assert ShardSource([shard]).caption(3) == "picture 3"

    def test_it_is_mapped(self, tmp_path: Path) -> None:
        """So that all processes of a run share its memory."""
        members = [(f"{number}.jpg", b"x") for number in range(2000)]
        source = ShardSource([write_tar(tmp_path / "a.tar", members)])
        assert isinstance(source._index.offset, np.memmap)


def test_workers_read_the_same(shard: Path) -> None:
    source = ShardSource([shard])
    plain = [source.content(index) for index in range(30)]

    class Contents(Dataset[tuple[str, str, int]]):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[str, str, int]:
            pair = source[index]
            return source.content(index), str(pair.caption), pair.image.width

    loader: DataLoader[Any] = DataLoader(
        Contents(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    found = list(loader)
    assert [content for content, _, _ in found] == plain
    assert [caption for _, caption, _ in found] == [f"picture {index}" for index in range(30)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_content, [source] * 2, [0, 29])) == [plain[0], plain[29]]


def _content(source: ShardSource, index: int) -> str:
    return source.content(index)


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN", 3)
    paths = [write_tar(tmp_path / f"{n}.tar", [("a.jpg", jpeg(n))]) for n in range(10)]
    source = ShardSource(paths)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for index in (*range(10), *range(10)):
        assert source[index].image.size == (12, 9)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("x/a.jpg", jpeg(0)), ("x/b.jpg", jpeg(1)[:60])])
    source = ShardSource([path])
    assert source[0].image.size == (12, 9)
    with pytest.raises(InputError, match=r"a\.tar, x/b\.jpg: .*cannot be decoded"):
        source[1]
    for index in (2, -1):
        with pytest.raises(IndexError):
            source[index]


def test_a_shard_that_shrinks_while_it_is_used(shard: Path) -> None:
    source = ShardSource([shard])
    os.truncate(shard, 3000)
    with pytest.raises(InputError, match=r"a\.tar has become shorter"):
        source[29]


def test_samples_without_a_picture_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("a.txt", b"x"), ("b.jpg", jpeg(0)), ("c.json", b"{}"), ("d.json", b"[")]
    assert len(ShardSource([write_tar(tmp_path / "a.tar", members)])) == 1
    assert "left out 3 samples of the shards without a picture" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"<html>" * 200, "is no tar file, or damaged at byte 0"),
        (lambda data: data[: len(data) // 2], "is cut off in|damaged at byte"),
        (lambda data: data[:700], "is cut off in|damaged at byte"),
        (lambda data: data[:512], "is cut off in"),
        (lambda data: data[:1536] + b"x" + data[1537:], "damaged at byte"),
    ],
)
def test_damaged_shards(tmp_path: Path, make: Callable[[bytes], bytes], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(4)])
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        ShardSource([path])
    assert "a.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_leads_backwards(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1))])
    with tarfile.open(path) as archive:
        second = archive.getmember("b.jpg").offset
    data = bytearray(path.read_bytes())
    data[second + 124 : second + 136] = b"\xff" * 10 + (-2048).to_bytes(2, "big", signed=True)
    data[second + 148 : second + 156] = b" " * 8
    data[second + 148 : second + 156] = b"%06o\0 " % sum(data[second : second + 512])
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged at byte"):
        ShardSource([path])


@given(
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    block=st.integers(0, 12),
    place=st.sampled_from([0, 100, 124, 125, 134, 156, 257, 263, 345, 482]),
    data=st.lists(st.sampled_from(b"\0\xff\x80xLKSg5190 ="), min_size=1, max_size=8),
)
@example(form=tarfile.USTAR_FORMAT, block=0, place=124, data=list(b"\x80\xff\xff\xff\xff\xff\xff"))
def test_any_header_gives_samples_or_one_line(
    form: int, block: int, place: int, data: list[int]
) -> None:
    """With a checksum that is right, as a header has that was made to mislead."""
    path = Path(os.environ["EDGECLIP_CACHE"]).with_name("made.tar")
    members = [("a.jpg", jpeg(0)), (f"{'x/' * 70}b.jpg", jpeg(1)), ("\xe4.txt", b"a tree")]
    whole = bytearray(write_tar(path, members, form).read_bytes())
    head = whole[BLOCK * block : BLOCK * (block + 1)]
    head[place : place + len(data)] = bytes(data)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    whole[BLOCK * block : BLOCK * (block + 1)] = head
    path.write_bytes(whole)
    told = ""
    try:
        ShardSource([path])
    except InputError as error:
        told = str(error)
    assert "\n" not in told


@given(st.integers(0, 4000), st.binary(min_size=1, max_size=3))
def test_any_damage_gives_samples_or_one_line(place: int, data: bytes) -> None:
    path = Path(os.environ["EDGECLIP_CACHE"]).with_name("spoiled.tar")
    write_tar(path, [("a.jpg", jpeg(0)), ("a.txt", b"a tree"), ("b.jpg", jpeg(1))])
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)
    told = ""
    try:
        source = ShardSource([path])
        for index in range(len(source)):
            source[index]
    except InputError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/{0..3}.tar", r"no/0\.tar matches no shard"),
        ("no/*.tar", r"no/\*\.tar matches no shard"),
        ("a.tar.gz", r"a\.tar\.gz is compressed"),
        ("b.tgz", r"b\.tgz is compressed"),
        ("bare.tar", "none of 1 shards holds a picture"),
    ],
)
def test_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / name).touch()
    write_tar(tmp_path / "bare.tar", [("a.txt", b"a")])
    with pytest.raises(InputError, match=message):
        open_source(data, split="train", count=1, size=8)


@given(st.text("a{},.01-", max_size=14))
def test_braces_are_those_of_webdataset(pattern: str) -> None:
    try:
        theirs = list(braceexpand.braceexpand(pattern))
    except ValueError:  # unbalanced
        return
    if "{" in pattern and any("{" in found or "}" in found for found in theirs):
        return  # what means nothing may be kept in other ways
    if "{}" in pattern or "-" in pattern or "a..a" in pattern:
        return  # negative numbers and letters
    assert expand_braces(pattern) == theirs


@pytest.mark.parametrize(
    "pattern",
    [
        "x/{00000..00012}.tar",
        "{8..12}.tar",
        "{3..1}",
        "{a,b}/{0..1}.tar",
        "{train,val}-{000..001}.tar",
        "plain.tar",
        "a{,b}.tar",
    ],
)
def test_braces(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


def test_braces_of_a_command_stay() -> None:
    command = "pipe:awk '{print}' {a,b}.tar"
    assert expand_braces(command) == ["pipe:awk '{print}' a.tar", "pipe:awk '{print}' b.tar"]


def test_few_of_many_are_judged() -> None:
    scenes = EmojiSource("test", 3 * MOST_JUDGED, size=8)
    chosen = judged(scenes)
    assert len(chosen) == MOST_JUDGED
    assert chosen.content(1) == scenes.content(3)
    assert judged(chosen) is chosen


def test_an_index_is_made_fast(tmp_path: Path) -> None:
    """Not slower than `tarfile` lists the members, though texts are read too."""
    samples = [{"__key__": f"{n:09d}", "jpg": jpeg(1), "txt": f"picture {n}"} for n in range(3000)]
    path = write_samples(tmp_path / "a.tar", samples)

    def seconds(run: Callable[[], object]) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    def listed() -> None:
        with tarfile.open(path) as archive:
            archive.getmembers()

    ratios = [seconds(lambda: shard_index._scan(path)) / seconds(listed) for _ in range(3)]
    assert min(ratios) < 1
