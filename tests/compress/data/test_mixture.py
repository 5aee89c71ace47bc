from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.mixture import Mixture, only, parts_of
from edgeclip.compress.data.open_source import is_shards, open_source, split_weight
from edgeclip.compress.data.sampling import Part, Sampling
from edgeclip.compress.data.sources import (
    EmojiSource,
    FolderSource,
    captions_of,
    first_without_caption,
    most_captions,
    without,
)
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures without captions."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(8):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(path / f"{number}.png")
    return path


@pytest.fixture
def mixture(folder: Path) -> Mixture:
    scenes = EmojiSource("train", 5, size=8)
    return Mixture([scenes, FolderSource(folder, split="train", divide=False)], [1.0, 3.0])


def test_one_source_behind_the_other(mixture: Mixture, folder: Path) -> None:
    scenes, photos = mixture.sources
    assert (len(mixture), mixture.split, mixture.has_captions) == (13, "train", True)
    for index in range(13):
        source, own = (scenes, index) if index < 5 else (photos, index - 5)
        assert mixture.content(index) == source.content(own)
        assert mixture.captions(index) == source.captions(own)
        assert mixture[index].caption == mixture.caption(index) == source.caption(own)
        assert mixture[index].image.tobytes() == source[own].image.tobytes()
    assert most_captions(mixture) == 1
    assert first_without_caption(mixture) == 5
    with pytest.raises(ConfigError, match=r"photos.*: this needs a caption for every picture"):
        captions_of(mixture, range(13))
    for beyond in (13, -1):
        with pytest.raises(IndexError):
            mixture[beyond]
    other = FolderSource(folder, split="test", divide=False)
    assert Mixture([scenes, other], [None, None]).split is None


def test_weights_are_for_sampling_alone(mixture: Mixture) -> None:
    assert parts_of(mixture) == (Part(5, 1.0), Part(8, 3.0))
    assert Mixture(mixture.sources, [None, None]).identity == mixture.identity
    assert Mixture(mixture.sources[::-1], [1.0, 3.0]).identity != mixture.identity
    index, _ = Sampling(parts_of(mixture), held_out=0).items(0, 4000)
    assert abs(np.mean(index < 5) - 0.25) < 0.001
    assert parts_of(mixture.sources[0]) == (Part(5),)


def test_bad_pictures_are_left_out_of_their_part(mixture: Mixture) -> None:
    rest = without(mixture, [0, 3, 12])
    assert isinstance(rest, Mixture)
    assert parts_of(rest) == (Part(3, 1.0), Part(7, 3.0))
    kept = [index for index in range(13) if index not in (0, 3, 12)]
    assert [rest.content(place) for place in range(10)] == [mixture.content(i) for i in kept]
    alone = without(mixture, range(5))
    assert parts_of(alone) == (Part(8, 3.0),)


def test_the_option_data(folder: Path) -> None:
    found = open_source(["emoji=0.25", f"{folder}=3"], split="train", count=4, size=8)
    assert [(part.count, part.weight) for part in parts_of(found)] == [(4, 0.25), (5, 3.0)]
    equal = open_source(["emoji", str(folder)], split="train", count=4, size=8)
    assert [part.weight for part in parts_of(equal)] == [None, None]
    alone = open_source([f"{folder}=1"], split="train", count=4, size=8)
    assert isinstance(alone, FolderSource)
    with pytest.raises(ConfigError, match="behind every --data or behind none"):
        open_source(["emoji", f"{folder}=2"], split="train", count=4, size=8)
    with pytest.raises(ConfigError, match="emoji=0: a weight must be above 0"):
        open_source(["emoji=0", f"{folder}=2"], split="train", count=4, size=8)
    with pytest.raises(ConfigError, match="give --data at least once"):
        open_source([], split="train", count=4, size=8)


def test_a_source_without_a_weight_is_named_as_it_was_given(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--data missing/ has no weight"):
        open_source(["missing/", f"{folder}=2"], split="train", count=4, size=8)


def test_a_small_source_may_have_nothing_to_judge_on(folder: Path) -> None:
    for number in range(1, 8):
        (folder / f"{number}.png").unlink()
    (split,) = [name for name in SPLITS if _has(folder, name)]
    for other in set(SPLITS) - {split, "train"}:
        found = open_source([str(folder), "emoji"], split=other, count=4, size=8)
        assert len(found) == 4
        with pytest.raises(ConfigError, match=f"none of the 1 pictures in .* falls to {other}"):
            open_source([str(folder), str(folder)], split=other, count=4, size=8)
    if split != "train":
        with pytest.raises(ConfigError, match="none of the 1 pictures"):
            open_source([str(folder), "emoji"], split="train", count=4, size=8)


def _has(folder: Path, split: Split) -> bool:
    try:
        return bool(len(FolderSource(folder, split=split)))
    except ConfigError:
        return False


def test_unreadable_pictures_of_a_mixture(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"no picture")
    data = ["emoji", str(folder)]
    everything = open_source(data, split="train", count=4, size=8)
    found = open_source(data, split="train", count=4, size=8, max_bad=DEFAULT_MAX_BAD)
    assert len(found) == len(everything) - 1
    for index in range(len(found)):
        assert found[index].image.width == 8


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("photos", ("photos", None)),
        ("photos=0.7", ("photos", 0.7)),
        ("photos=.5", ("photos", 0.5)),
        ("photos=3", ("photos", 3.0)),
        ("photos=x", ("photos=x", None)),
        ("hf:a/b:train=2", ("hf:a/b:train", 2.0)),
        ("hf:a/b?stream&first=100", ("hf:a/b?stream&first=100", None)),
        ("hf:a/b?stream&first=100=2", ("hf:a/b?stream&first=100", 2.0)),
        ("hf:a/b?stream=0.5", ("hf:a/b?stream", 0.5)),
        ("https://x/{0..9}.tar?key=5", ("https://x/{0..9}.tar?key=5", None)),
        ("https://x/{0..9}.tar=5", ("https://x/{0..9}.tar", 5.0)),
        ("pipe:cat {0..9}.tar --jobs=5", ("pipe:cat {0..9}.tar --jobs=5", None)),
        ("pipe:cat {0..9}.tar=5", ("pipe:cat {0..9}.tar", 5.0)),
    ],
)
def test_weights_are_spelled(data: str, expected: tuple[str, float | None]) -> None:
    assert split_weight(data) == expected


def test_a_weight_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="a weight must be above 0"):
        split_weight("photos=0")


def test_a_folder_whose_name_looks_like_a_weight(tmp_path: Path) -> None:
    (tmp_path / "lr=0.5").mkdir()
    assert split_weight(f"{tmp_path}/lr=0.5") == (f"{tmp_path}/lr=0.5", None)


def test_what_is_taken_for_shards(tmp_path: Path, folder: Path) -> None:
    written = tmp_path / "written"
    written.mkdir()
    for name in ("0.tar", "0.parquet", "0_stats.json"):
        (written / name).touch()
    for data in ("a.tar", "x/{0..9}.tar", "*.tar", "a.tar.gz", "b.tgz", "pipe:cat a", "s3://b/a"):
        assert is_shards(data)
    assert is_shards(str(written))
    (written / "a.jpg").touch()
    for data in (str(written), str(folder), "photos", "emoji", "hf:a/b"):
        assert not is_shards(data)
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"), split="train", count=1, size=8)


def test_a_mixture_of_chosen_pairs_keeps_its_weights() -> None:
    parts = [EmojiSource("train", count, size=8, seed=count) for count in (5, 4, 3)]
    mixed = Mixture(parts, [3.0, 2.0, 1.0])
    rows = np.array([1, 4, 10, 11])
    kept = only(mixed, rows, name="some")
    assert isinstance(kept, Mixture)
    assert [kept.content(i) for i in range(4)] == [mixed.content(i) for i in rows.tolist()]
    assert kept.parts == (Part(2, 3.0), Part(2, 1.0))
    plain = only(parts[0], np.array([3]), name="one")
    assert (plain.name, plain.content(0)) == ("one", parts[0].content(3))
