import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from edgeclip.compress.data.hub_source import DatasetName
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import FolderSource, Source, most_captions
from edgeclip.runtime.errors import ConfigError, InputError, MissingExtraError
from tests import watched_network

pytestmark = pytest.mark.slow

SPLITS = ("train", "calibration", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def png(number: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (9, 7), (number, 0, 0)).save(held, "PNG")
    return held.getvalue()


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "image": Image.new("RGB", (9, 7), (number, 0, 0)),
            "caption": [f"{number} {word}" for word in "ab"][: 1 + number % 2],
            "id": number,
        }
        for number in range(first, first + count)
    ]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        table = datasets.Dataset.from_list(rows(50, 50 * number))
        table.to_parquet(folder / f"train-{number}.parquet")
    return folder


def opened(data: str, split: str = "train") -> Source:
    return open_source(data, split=split, count=1, size=8)  # type: ignore[arg-type]


def check(source: Source) -> list[int]:
    """Return the numbers of the rows, which picture and captions agree on."""
    numbers = []
    for index in range(len(source)):
        captions = source.captions(index)
        number = int(captions[0].split()[0])
        assert captions == tuple(f"{number} {word}" for word in "ab")[: 1 + number % 2]
        pair = source[index]
        assert (pair.caption, source.caption(index)) == (captions[0], captions[0])
        assert pair.image.getpixel((0, 0)) == (number, 0, 0)
        numbers.append(number)
    return numbers


def test_parquet_files(parquet: Path) -> None:
    found = {split: check(opened(f"parquet:{parquet}", split)) for split in SPLITS}
    assert sorted(number for own in found.values() for number in own) == list(range(100))
    assert len(found["train"]) > 60
    assert all(found.values())
    assert check(opened(f"parquet:{parquet}/*-1.parquet"))[0] >= 50
    source = opened(f"parquet:{parquet}")
    assert (source.has_captions, most_captions(source)) == (True, 2)
    for index in (len(source), -1):
        with pytest.raises(IndexError):
            source[index]


def test_pictures_are_the_same_as_in_a_folder(parquet: Path, tmp_path: Path) -> None:
    source = opened(f"parquet:{parquet}")
    numbers = check(source)
    (tmp_path / "folder").mkdir()
    table = datasets.load_dataset("parquet", data_files=f"{parquet}/*.parquet", split="train")
    table = table.cast_column("image", datasets.Image(decode=False))
    (tmp_path / "folder" / "a.png").write_bytes(table[numbers[3]]["image"]["bytes"])
    folder = FolderSource(tmp_path / "folder", min_side=8)
    assert folder.content(0) == source.content(3)


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    parts = {
        "train": rows(20),
        "validation": rows(30, 100),
        "extra": rows(5, 200),
    }
    tables = {name: datasets.Dataset.from_list(own) for name, own in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    data = f"hf:{tmp_path / 'saved'}"
    found = {split: check(opened(data, split)) for split in SPLITS}
    assert found["train"] == list(range(20))
    assert sorted(found["calibration"] + found["test"]) == list(range(100, 130))
    assert 5 < len(found["test"]) < 25
    with pytest.raises((ConfigError, InputError)):
        opened(data, "unseen")
    tables["train"].save_to_disk(tmp_path / "single")
    assert len(opened(f"hf:{tmp_path / 'single'}")) < 20


def test_an_image_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,{number} a")
    (folder / "metadata.csv").write_text("\n".join(lines))
    source = opened(f"hf:{tmp_path / 'folder'}")
    assert 8 < len(source) < 20
    number = int(str(source.caption(2)).split()[0])
    assert source[2].image.getpixel((0, 0)) == (number, 0, 0)


@pytest.mark.parametrize(
    ("columns", "options", "captions"),
    [
        ({"jpg": True, "txt": "a"}, "", ("a",)),
        ({"image": True, "TEXT": "b", "url": "http://x"}, "", ("b",)),
        ({"image": True, "sentences": [{"raw": "one"}, {"raw": "two"}]}, "", ("one", "two")),
        ({"img": True, "caption_0": "x", "caption_1": "y"}, "", ("x", "y")),
        ({"img": True, "json": {"caption": "deep", "n": 1}}, "", ("deep",)),
        ({"image": True, "alt": "named", "title": "other"}, "?caption=alt", ("named",)),
        ({"image": True, "other": True, "text": "t"}, "?image=other", ("t",)),
        ({"image": True, "label": 3}, "", ()),
        ({"image": True, "caption": None}, "", ()),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_columns(
    tmp_path: Path, columns: dict[str, Any], options: str, captions: tuple[str, ...], declared: bool
) -> None:
    given = [
        {
            name: (Image.open(io.BytesIO(png(number))) if declared else png(number))
            if value is True
            else value
            for name, value in columns.items()
        }
        for number in range(10)
    ]
    datasets.Dataset.from_list(given).save_to_disk(tmp_path / "saved")
    source = opened(f"hf:{tmp_path / 'saved'}{options}")
    assert source.captions(1) == captions
    assert source.has_captions is bool(captions)
    assert source[0].image.size == (9, 7)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    given = [{"image": data, "text": "x"} for data in [png(0), b"", b"<html>"] * 20]
    datasets.Dataset.from_list(given).save_to_disk(tmp_path / "saved")
    source = opened(f"hf:{tmp_path / 'saved'}")
    told = []
    for index in range(len(source)):
        try:
            source[index]
        except InputError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all("saved, row " in line for line in told)
    assert any("there is no picture" in line for line in told)
    assert any("is not an image of a known format" in line for line in told)


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_stream_is_read_once(parquet: Path, form: str, tmp_path: Path) -> None:
    data = f"parquet:{parquet}?stream&first=70" if form == "parquet" else f"hf:{parquet}?stream"
    found = {split: check(opened(data, split)) for split in SPLITS}
    count = 70 if form == "parquet" else 100
    assert sorted(number for own in found.values() for number in own) == list(range(count))
    for path in parquet.iterdir():
        path.unlink()
    assert check(opened(data)) == found["train"]


def test_a_stream_that_was_stopped_goes_on(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeclip.compress.data import hub_source

    monkeypatch.setattr(hub_source, "_SPOOLED", 30)
    data = f"parquet:{parquet}?stream"
    real = hub_source._add_sample

    def stopped(archive: Any, key: str, *rest: Any) -> None:
        if int(key) == 75:
            raise KeyboardInterrupt
        real(archive, key, *rest)

    monkeypatch.setattr(hub_source, "_add_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        opened(data)
    kept = {path: path.read_bytes() for path in (tmp_path / "cache" / "streams").rglob("*.tar")}
    assert len(kept) == 2
    monkeypatch.setattr(hub_source, "_add_sample", real)
    found = {split: check(opened(data, split)) for split in SPLITS}
    assert sorted(number for own in found.values() for number in own) == list(range(100))
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_workers_read_the_same(parquet: Path) -> None:
    source = opened(f"parquet:{parquet}")

    class Pairs(Dataset[tuple[str, str, Any]]):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[str, str, Any]:
            pair = source[index]
            return source.content(index), str(pair.caption), np.asarray(pair.image)

    loader: DataLoader[Any] = DataLoader(
        Pairs(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for index, (content, caption, pixels) in enumerate(loader):
        assert (content, caption) == (source.content(index), source.caption(index))
        np.testing.assert_array_equal(pixels, np.asarray(source[index].image))


_OPEN = """
import sys
from edgeclip.compress.data.open_source import open_source

source = open_source(sys.argv[1], split="train", count=1, size=8)
source[0], source.captions(0)
print(source.identity)
"""


def _environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home)}


def test_the_identity_is_the_same_in_every_process(parquet: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OPEN, f"parquet:{parquet}"]
    found = [
        subprocess.run(
            command, env=_environment(tmp_path), capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    options = opened(f"parquet:{parquet}?caption=id").identity
    assert opened(f"parquet:{parquet}").identity != options
    datasets.Dataset.from_list(rows(50)[::-1]).to_parquet(parquet / "train-0.parquet")
    changed = subprocess.run(
        command, env=_environment(tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert changed != found[0]


def test_local_data_is_told_to_nobody(parquet: Path, tmp_path: Path) -> None:
    reason = watched_network.why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png(number))
    names = (f"parquet:{parquet}", f"hf:{folder}", f"parquet:{parquet}?stream")
    commands = [[sys.executable, "-c", _OPEN, name] for name in names]
    assert watched_network.watch(commands, tmp_path, _environment(tmp_path)) == []


def _names() -> Iterator[tuple[str, DatasetName]]:
    yield "hf:owner/name", DatasetName("owner/name")
    yield "hf:owner/name@main:train", DatasetName("owner/name", revision="main", split="train")
    yield "hf:owner/name/english:test", DatasetName("owner/name", config="english", split="test")
    yield "hf:name:train[:10%]", DatasetName("name", split="train[:10%]")
    yield (
        "hf:owner/name?stream&first=10&caption=alt",
        DatasetName("owner/name", stream=True, first=10, caption="alt"),
    )
    yield "parquet:a/*.parquet?image=i", DatasetName("a/*.parquet", is_parquet=True, image="i")


@pytest.mark.parametrize(("data", "expected"), list(_names()))
def test_names(data: str, expected: DatasetName) -> None:
    assert DatasetName.parse(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf:x?shuffle=1", "unknown option shuffle; there are image, caption, stream, first"),
        ("hf:x?stream&first=0", "first=0 is no number above 0"),
        ("hf:x?first=10", "belongs to a stream"),
        ("hf:@x", "write hf:REPO"),
        ("parquet:nowhere/*.parquet", "matches no .parquet file"),
        ("hf:./nowhere", r"cannot be opened by the package datasets: .*; check the name"),
    ],
)
def test_mistakes(data: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises((ConfigError, InputError), match=message) as caught:
        opened(data)
    assert "\n" not in str(caught.value)


def test_no_column_of_pictures(tmp_path: Path) -> None:
    given = [{"url": "http://x/a.jpg", "caption": "a"}] * 9
    datasets.Dataset.from_list(given).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"no column of pictures .* are url, caption; name it by"):
        opened(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(ConfigError, match="has no column alt: its columns are url, caption"):
        opened(f"hf:{tmp_path / 'saved'}?caption=alt")


def test_without_the_package(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgeclip\[data\]'"):
        opened(f"parquet:{parquet}")
