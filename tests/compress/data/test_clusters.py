"""Which pictures belong together: by folder, by the time they were taken, by their embeddings."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.compress.data.clusters import embedding_clusters, folder_clusters, time_clusters
from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.runtime.errors import ConfigError


def picture(path: Path, taken: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    if taken is not None:
        exif.get_ifd(0x8769)[0x9003] = taken
    image.save(path, exif=exif)


def groups(source: FolderSource, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> set[str]:
    found: dict[int, list[str]] = {}
    for path, number in zip(source.paths, numbers.tolist(), strict=True):
        found.setdefault(number, []).append(path.stem)
    return {"".join(sorted(names)) for names in found.values()}


def test_by_folder(tmp_path: Path) -> None:
    for name in ("one/a", "one/b", "two/c", "two/deep/d"):
        picture(tmp_path / f"{name}.jpg")
    source = FolderSource(tmp_path)
    found = folder_clusters(source)
    assert found.dtype == np.int64
    assert groups(source, found) == {"ab", "c", "d"}


def test_by_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, taken in {
        "one/a": "2026:01:01 10:00:00",
        "one/b": "2026:01:01 10:00:59",
        "one/c": "2026:01:01 10:01:59",  # within 60 s of b, if not of a
        "one/d": "2026:01:01 10:03:00",
        "two/e": "2026:01:01 10:00:10",  # another folder, another camera
        "two/f": None,
        "two/g": None,
        "two/h": "0000:00:00 00:00:00",
    }.items():
        picture(tmp_path / f"{name}.jpg", taken)
    source = FolderSource(tmp_path)
    with caplog.at_level(logging.INFO, logger="edgeclip.compress.data.clusters"):
        assert groups(source, time_clusters(source)) == {"abc", "d", "e", "f", "g", "h"}
    assert "3 of 8 pictures" in caplog.text


def test_by_embedding_chains_are_one_cluster() -> None:
    angles = np.radians([0, 5, 10, 15, 90, 92, 180])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = embedding_clusters(embeddings, float(np.cos(np.radians(6))))
    assert found.tolist() == [0, 0, 0, 0, 4, 4, 6]
    assert embedding_clusters(embeddings, 1.1).tolist() == list(range(7))


def test_by_embedding_over_several_blocks() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1200, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shuffled = rng.permutation(np.tile(np.arange(1200), 4))
    found = embedding_clusters(rows[shuffled], 0.999)
    assert len(np.unique(found)) == 1200
    for number in (0, 600, 1199):
        assert len(np.unique(found[shuffled == number])) == 1


def test_drawn_scenes_have_no_folders() -> None:
    source = EmojiSource("test", 2, size=32)
    for clusters in (folder_clusters, time_clusters):
        with pytest.raises(ConfigError, match="--cluster-by embedding or none"):
            clusters(source)
