from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.data.sources import EmojiSource, FolderSource
from edgeclip.compress.diagnose.concepts import concept_questions
from edgeclip.compress.diagnose.groups import DifferenceEstimate, find_groups, group_quality
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.shares import estimate_share


def test_a_difference_has_the_interval_of_newcombe() -> None:
    # 56 of 70 and 48 of 80: 0.2, 0.0524 to 0.3339 (Newcombe 1998, table II, method 10).
    first, second = (
        estimate_share(np.arange(count) < hits) for hits, count in ((56, 70), (48, 80))
    )
    found = DifferenceEstimate(first, second).interval
    assert found.value == pytest.approx(0.2)
    # estimate_share adds half a hit and half a miss to its variance.
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=0.002)


def test_one_bad_group_is_found_among_many_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    number = rng.integers(0, 12, 1200)
    groups = Groups("camera", tuple(f"c{at:02d}" for at in range(12)), number)
    theirs = (rng.random(1200) < 0.95).astype(float)
    ours = theirs * (rng.random(1200) < 0.95)
    assert not any(item.is_behind for item in group_quality([groups], ours, theirs))
    ours[(number == 3) & (rng.random(1200) < 0.3)] = 0
    found = group_quality([groups], ours, theirs)
    assert [item.name for item in found if item.is_behind] == ["c03"]
    (bad,) = (item for item in found if item.is_behind)
    assert bad.behind.low > 0
    assert bad.pictures == (number == 3).sum()


def test_what_groups_are_known() -> None:
    scenes = EmojiSource("test", 30, size=16)
    found = find_groups(scenes, (), None)
    assert [item.column for item in found] == ["background", "objects", "layout"]
    for index in range(30):
        scene = scenes.scene(index)
        assert found[0].names[found[0].number[index]] == scene.background
        assert found[1].names[found[1].number[index]] == str(len(scene.objects))
    with pytest.raises(ConfigError, match="camera"):
        find_groups(scenes, ("camera",), None)


def test_a_folder_of_one_place_has_no_groups(source: FolderSource) -> None:
    assert find_groups(source, (), None) == ()
    with pytest.raises(ConfigError, match="one folder"):
        find_groups(source, ("folder",), None)


@pytest.mark.parametrize("by", [(), ("folder",)])
def test_a_table_without_a_column_is_refused(source: FolderSource, by: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--group-by"):
        find_groups(source, by, Path("table.csv"))
    with pytest.raises(ConfigError, match="--group-table"):
        find_groups(EmojiSource("test", 2, size=16), ("objects",), Path("table.csv"))


def test_questions_change_one_word() -> None:
    captions = [f"a cup on a {'red' if at % 2 else 'blue'} table" for at in range(20)]
    captions += ["a red cup on a blue table", "a cup", "a Red cup"]
    (asked,) = concept_questions(captions)
    assert asked.words == ("red", "blue")
    assert asked.rows.tolist() == [*range(20), 22]  # two colours, or none, ask nothing
    assert asked.prompts[:2] == ("a cup on a red table", "a cup on a blue table")
    assert asked.right[:2].tolist() == [1, 0]
    # Pictures that lie at their own caption choose it.
    texts = np.random.default_rng(0).normal(size=(len(asked.prompts), 5))
    image = np.zeros((len(captions), 5))
    image[asked.rows] = texts.reshape(-1, 2, 5)[np.arange(21), asked.right]
    own = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    assert (asked.choices(image, own) == asked.right).all()


def test_grey_and_gray_are_one_word() -> None:
    captions = ["a grey cup", "a Gray cup", "a red cup"] * 5
    (asked,) = concept_questions(captions)
    assert asked.words == ("red", "grey")
    assert asked.right.tolist() == [1, 1, 0] * 5


def test_rare_words_ask_nothing() -> None:
    assert concept_questions(["a red cup", "a blue cup"] * 2) == ()
