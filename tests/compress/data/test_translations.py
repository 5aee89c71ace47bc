"""A student reads translations of the captions that its teacher embedded."""

from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.data.emoji_scenes import EmojiScenes
from edgeclip.compress.data.mixture import Mixture, parts_of
from edgeclip.compress.data.scene_languages import LANGUAGES, translate_caption
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.data.translations import read_translations, translated
from edgeclip.runtime.errors import InputError

SOURCE = EmojiSource("train", 12, size=32)


def table(folder: Path, *lines: str) -> Path:
    path = folder / "translations.csv"
    path.write_text("\n".join(("caption,translation", *lines)) + "\n", encoding="utf-8")
    return path


def test_captions_and_their_translations_take_turns(tmp_path: Path) -> None:
    caption = SOURCE.caption(3)
    path = table(tmp_path, f"{caption},eins", f"{caption},deux")
    found, says = translated(SOURCE, path)
    choices = (caption, "eins", "deux")
    assert found.captions(3) == (choices[3 % 3],)
    assert found.captions(4) == SOURCE.captions(4)
    assert found.identity == SOURCE.identity  # of the teacher's cache
    assert found.content(3) == SOURCE.content(3)
    assert "1 of the first 12 captions" in says
    other = EmojiSource("train", 5, size=32)
    mixed, _ = translated(Mixture([SOURCE, other], [1.0, 3.0]), path)
    assert [part.weight for part in parts_of(mixed)] == [1.0, 3.0]
    assert mixed.identity == Mixture([SOURCE, other], [1.0, 3.0]).identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption,text\na,b\n", "no column 'translation'"),
        ("caption,translation\na,\n", "line 2: a cell is empty"),
        ("caption,translation\n", "holds no translations"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_translations(path)


def test_a_table_of_other_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="translates none"):
        translated(SOURCE, table(tmp_path, "a cat,eine Katze"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_scenes_can_be_said_in_every_language(language: str) -> None:
    world = EmojiScenes("train")
    scenes = [world.scene(number) for number in range(200)]
    said = [translate_caption(scene, language) for scene in scenes]
    assert len(set(said)) > 0.98 * len({scene.caption for scene in scenes})
    assert np.mean([one == scene.caption for one, scene in zip(said, scenes, strict=True)]) == 0
