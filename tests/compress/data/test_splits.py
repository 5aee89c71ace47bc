import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.data.emoji_scenes import Split, split_of
from edgeclip.compress.data.splits import OwnSplits

SPLITS: tuple[Split, ...] = ("train", "calibration", "test", "unseen")


def _found(own: OwnSplits, name: str | None, key: str) -> list[Split]:
    return [split for split in SPLITS if own.include(split, name, key)]


@given(st.text())
def test_what_says_nothing_is_divided_by_the_hash(key: str) -> None:
    for names in ((), ("train",), ("test",), ("val", "test"), ("train", "unseen"), ("all",)):
        own = OwnSplits(names)
        assert _found(own, next(iter(names), None), key) == [split_of(key)]


@given(st.text())
def test_three_splits_are_taken_as_they_are(key: str) -> None:
    own = OwnSplits(("train", "restval", "Validation", "test", "extra"))
    assert _found(own, "train", key) == _found(own, "restval", key) == ["train"]
    assert _found(own, "Validation", key) == ["calibration"]
    assert _found(own, "test", key) == ["test"]
    assert _found(own, "extra", key) == _found(own, None, key) == []
    assert own.names_of("train") == ("train", "restval")


@pytest.mark.parametrize("name", ["val", "test", "dev"])
def test_one_split_to_judge_on_is_halved(name: str) -> None:
    own = OwnSplits(("train", name))
    found = [_found(own, name, str(number)) for number in range(2000)]
    assert all(len(splits) == 1 for splits in found)
    assert 850 < found.count(["calibration"]) < 1150
    assert found.count(["test"]) == 2000 - found.count(["calibration"])
    assert _found(own, "train", "any") == ["train"]
    assert own.names_of("calibration") == own.names_of("test") == (name,)
