"""`edgeclip scenes` makes a folder that the other commands can read."""

from pathlib import Path

import pytest
from PIL import Image

from edgeclip.compress.data.emoji_scenes import EmojiScenes
from edgeclip.compress.data.sources import FolderSource
from edgeclip.runtime.cli.main import main


def test_pictures_and_captions_belong_together(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    assert main(["scenes", str(folder), "--count", "5", "--size", "40"]) == 0
    source = FolderSource(folder)
    assert len(source) == 5
    for number, scene in enumerate(EmojiScenes("test").distinct(5)):
        pair = source[number]
        assert pair.caption == scene.caption
        assert pair.image.tobytes() == EmojiScenes.render(scene, 40).tobytes()


def test_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    assert main(["scenes", str(folder), "--count", "4", "--size", "16"]) == 0
    assert main(["scenes", str(folder), "--count", "2", "--size", "16"]) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == ["00000.png", "00001.png"]


def test_a_folder_of_ones_own_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    (tmp_path / "captions.csv").write_text("file,caption\nmine.png,my cat\n", encoding="utf-8")
    assert main(["scenes", str(tmp_path), "--count", "2"]) == 2
    assert "holds no .edgeclip-scenes, so it is not replaced" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "mine.png"]


def test_a_count_below_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "photos"), "--count", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert not (tmp_path / "photos").exists()
