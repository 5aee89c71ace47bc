from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Pair, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.graph.calibration import (
    BEST,
    FEWEST_PAIRS,
    CalibrationSource,
    calibration_images,
    calibration_texts,
)
from edgeclip.runtime.errors import ConfigError

Make = Callable[..., Source]


@dataclass(frozen=True, slots=True)
class Part:
    """So many pairs of a split, all alike."""

    split: Split | None
    count: int = 32
    has_captions: bool = True

    @property
    def name(self) -> str:
        return f"{self.count} pairs"

    @property
    def identity(self) -> str:
        return f"{self.split}:{self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        return Pair(Image.new("RGB", (40, 48)), self.caption(index))

    def caption(self, index: int) -> str | None:
        return f"picture {index}: red" if self.has_captions else None

    def captions(self, index: int) -> tuple[str, ...]:
        return (str(self.caption(index)),) if self.has_captions else ()

    def content(self, index: int) -> str:
        return f"{index:064x}"


@pytest.mark.parametrize("split", ["calibration", "train"])
def test_pairs_for_calibration_or_training_are_taken(split: Split, clip: DualEncoder) -> None:
    source = CalibrationSource(Part(split))
    assert calibration_images(source, clip.spec.image).count == 2
    assert calibration_texts(source, clip.text_tokenizer).count >= 1
    assert (source.split, source.name, source.identity) == (split, "32 pairs", f"{split}:32")
    assert (len(source), source.has_captions) == (32, True)
    assert source[3].caption == source.caption(3) == "picture 3: red"


@pytest.mark.parametrize("split", ["test", "unseen", None])
def test_pairs_for_anything_else_are_refused_wherever_they_come_from(
    split: Split | None, clip: DualEncoder
) -> None:
    source = Part(split)
    message = f"its split is {split or 'unknown'}, and only calibration and train"
    with pytest.raises(ConfigError, match=message):
        CalibrationSource(source)
    with pytest.raises(ConfigError, match=message):
        CalibrationSource(source, fewest=1)
    with pytest.raises(ConfigError, match=message):
        calibration_images(source, clip.spec.image)
    with pytest.raises(ConfigError, match=message):
        calibration_texts(source, clip.text_tokenizer)


def test_too_few_pairs_are_refused_and_few_are_spoken_of() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        CalibrationSource(Part("train", 0))
    with pytest.raises(
        ConfigError, match=f"give at least {FEWEST_PAIRS} \\(128 to 512 are best\\)"
    ):
        CalibrationSource(Part("train", FEWEST_PAIRS - 1))
    few = CalibrationSource(Part("train", FEWEST_PAIRS))
    assert few.advice == f"{FEWEST_PAIRS} pairs are few to calibrate on: 128 to 512 are best"
    assert CalibrationSource(Part("train", BEST[0])).advice is None


def test_the_built_in_scenes_know_their_split(clip: DualEncoder) -> None:
    good: tuple[Split, ...] = ("train", "calibration")
    bad: tuple[Split, ...] = ("test", "unseen")
    for split in good:
        source = EmojiSource(split, 8, size=16)
        assert source.split == CalibrationSource(source).split == split
    for split in bad:
        with pytest.raises(ConfigError, match=f"split is {split}"):
            calibration_images(EmojiSource(split, 8, size=16), clip.spec.image)


@pytest.mark.parametrize("subfolders", [True, False], ids=["subfolders", "hashes"])
def test_folders_know_their_split(subfolders: bool, tmp_path: Path) -> None:
    for index in range(200):
        folder = tmp_path / ("train", "calibration", "test")[index % 3] if subfolders else tmp_path
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    for split in ("train", "calibration"):
        source = open_source(str(tmp_path), split=split, count=0, size=8)
        assert CalibrationSource(source).split == split
    test = open_source(str(tmp_path), split="test", count=0, size=8)
    with pytest.raises(ConfigError, match="its split is test"):
        CalibrationSource(test)
    with pytest.raises(ConfigError, match="its split is unknown"):
        CalibrationSource(FolderSource(tmp_path))


def test_no_bundle_is_planned_with_test_pairs_or_hardly_any(plan: BundlePlan) -> None:
    with pytest.raises(ConfigError, match="its split is test"):
        replace(plan, calibration=Part("test"))
    with pytest.raises(ConfigError, match="too few to calibrate on"):
        replace(plan, calibration=Part("calibration", FEWEST_PAIRS - 1))
