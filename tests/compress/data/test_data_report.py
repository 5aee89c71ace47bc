"""What a data report decides, on embeddings and statistics that are worked out by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.data_report import (
    DISAGREES,
    EXACT,
    NEAR,
    UNREADABLE,
    CaptionAgreement,
    CaptionStatistics,
    Judgement,
    KeepRules,
    agreement,
    caption_statistics,
    judge,
)
from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.near_duplicates import NearDuplicates, near_duplicates
from edgeclip.compress.data.picture_statistics import PictureStatistics
from edgeclip.compress.data.sources import Pair
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.interval import Interval


class Texts:
    """Grey pictures, each with any number of captions."""

    name, identity, has_captions = "texts", "texts", True
    split: Split | None = None

    def __init__(self, texts: list[tuple[str, ...]]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Pair:
        return Pair(Image.new("RGB", (8, 8)), self.caption(index))

    def caption(self, index: int) -> str | None:
        return next(iter(self._texts[index]), None)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._texts[index]

    def content(self, index: int) -> str:
        return f"{index:064x}"


def captions_of(texts: list[tuple[str, ...]]) -> CaptionStatistics:
    """Statistics of captions, with a token for each letter."""

    return caption_statistics(Texts(texts), lambda given: [len(text) for text in given], 5)


def test_captions_are_counted_by_picture() -> None:
    found = captions_of([("A  cat", "a dog"), ("a CAT",), (), ("a cat", "A Cat")])
    assert found.owner.tolist() == [0, 0, 1, 3, 3]
    assert found.tokens.tolist() == [6, 5, 5, 5, 5]
    assert found.repeated(4).tolist() == [3, 3, 0, 3]
    assert found.most_repeated(5) == [(0, 3)]


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3).map(tuple), max_size=12))
def test_repeated_captions_as_if_counted_one_by_one(texts: list[tuple[str, ...]]) -> None:
    if not texts:
        return
    found = captions_of(texts)
    pictures = {text: sum(text in own for own in texts) for text in "abc"}
    assert found.repeated(len(texts)).tolist() == [
        max((pictures[text] for text in own), default=0) for own in texts
    ]
    shown = dict.fromkeys(text for own in texts for text in own)
    flat = [text for own in texts for text in own]
    expected = {text: pictures[text] for text in shown if pictures[text] > 1}
    assert {flat[place]: times for place, times in found.most_repeated(9)} == expected


def turned(*degrees: float) -> NDArray[np.float16]:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)


class Held:
    """Embeddings of some pictures, [K, dim], and of their captions, [K, most captions, dim]."""

    def __init__(
        self, rows: NDArray[np.int64], image: NDArray[np.float16], text: NDArray[np.float16]
    ) -> None:
        self._place = {index: place for place, index in enumerate(rows.tolist())}
        self._image, self._text = image, text

    def image(self, indices: Sequence[int]) -> NDArray[np.float16]:
        return self._image[[self._place[index] for index in indices]]

    def text(self, indices: Sequence[int], numbers: int = 0) -> NDArray[np.float16]:
        return self._text[[self._place[index] for index in indices], numbers]


def test_agreement_is_that_of_the_caption_that_fits_best() -> None:
    captions = captions_of([("a", "b"), ("c",), ("unreadable",), ()])
    text = np.zeros((3, 2, 2), np.float16)
    text[0], text[1, 0] = turned(60, 30), turned(0)[0]
    rows = np.array([0, 1, 3])
    found = agreement(Held(rows, turned(0, 90, 45), text), rows, captions, 4)
    assert found.own[:2] == pytest.approx([math.cos(math.radians(30)), 0], abs=1e-3)
    assert np.isnan(found.own[2:]).all()
    assert found.other[:2] == pytest.approx([1, math.cos(math.radians(30))], abs=1e-3)
    assert found.own_wins is not None
    assert found.own_wins.value == 0  # both captions fit the other picture better
    assert not found.is_known


def test_an_equal_caption_of_another_picture_is_no_rival() -> None:
    captions = captions_of([("a cat",), ("A cat",)])
    held = Held(np.arange(2), turned(0, 0), turned(0, 0)[:, None])
    found = agreement(held, np.arange(2), captions, 2)
    assert np.isnan(found.other).all()
    assert found.own_wins is None


def known(own: list[float], other: float = 0.0) -> CaptionAgreement:
    values = np.array(own, np.float32)
    return CaptionAgreement(values, np.full(len(own), other, np.float32), Interval(0.9, 0.8, 1.0))


def test_far_below_the_rest_by_hand() -> None:
    # The median is 0.5, and the median absolute deviation 0.1.
    found = known([0.3, 0.4, 0.5, 0.6, 0.7], other=0.9)
    assert found.floor(3.5) == pytest.approx(0.5 - 3.5 * 0.1 / 0.6745, abs=1e-5)
    # A pair that agrees better than wrong ones is not far below.
    assert known([0.3, 0.4, 0.5, 0.6, 0.7], other=-0.5).floor(3.5) == pytest.approx(-0.5)
    assert known([0.5, 0.5, 0.5, 0.1]).floor(3.5) == -math.inf
    assert known([math.nan]).floor(3.5) == -math.inf


def statistics(count: int, **columns: list[float]) -> PictureStatistics:
    """Statistics of different pictures that are all alike but for some columns."""
    content = np.zeros((count, 32), np.uint8)
    content[:, 0] = np.arange(1, count + 1)
    names = ("short_side", "long_side", "sharpness", "brightness", "contrast", "noise")
    given_columns: dict[str, Any] = {name: np.ones(count, np.float32) for name in names}
    given_columns |= {name: np.array(values, np.float32) for name, values in columns.items()}
    return PictureStatistics(
        content=content,
        readable=np.ones(count, bool),
        thumbnails=np.zeros((count, 256), np.uint8),
        reasons={},
        **given_columns,
    )


def judged(
    found: PictureStatistics,
    embeddings: NDArray[np.float16] | None = None,
    agreed: CaptionAgreement | None = None,
    captions: CaptionStatistics | None = None,
    rules: KeepRules | None = None,
) -> Judgement:
    """Judge pictures; without embeddings none is like another."""
    if embeddings is None:
        embeddings = np.eye(len(found), dtype=np.float16)

    def compare(rows: NDArray[np.int64]) -> NearDuplicates:
        return near_duplicates(embeddings, found.thumbnails, rows, 0.99, most_exact=1000)

    return judge(found, captions, agreed, rules or KeepRules(), compare)


def test_of_equal_pictures_the_first_is_kept() -> None:
    found = statistics(4)
    found.content[3] = found.content[1]
    judgement = judged(found)
    assert judgement.those(EXACT).tolist() == [3]
    assert judgement.same_as.tolist() == [0, 1, 2, 1]
    assert judgement.kept.tolist() == [0, 1, 2]


def test_pictures_that_cannot_be_read_are_no_duplicates_of_each_other() -> None:
    found = statistics(3)
    found.content[1:] = 0
    found.readable[1:] = False
    judgement = judged(found)
    assert judgement.those(UNREADABLE).tolist() == [1, 2]
    assert judgement.those(EXACT).tolist() == []


def test_of_near_duplicates_the_largest_then_the_sharpest_is_kept() -> None:
    found = statistics(5, short_side=[10, 20, 20, 20, 5], sharpness=[9, 1, 2, 2, 9])
    judgement = judged(found, turned(0, 1, 2, 3, 90))
    assert judgement.kept.tolist() == [2, 4]
    assert judgement.those(NEAR).tolist() == [0, 1, 3]
    assert judgement.same_as.tolist() == [2, 2, 2, 2, 4]


def test_a_picture_left_out_for_another_reason_takes_no_copy_with_it() -> None:
    found = statistics(6, short_side=[20, 10, 10, 10, 10, 10])
    agreed = known([0.1, 0.5, 0.5, 0.52, 0.48, 0.54], other=0.4)
    judgement = judged(found, turned(0, 1, 60, 100, 140, 180), agreed)
    assert judgement.those(DISAGREES).tolist() == [0]
    assert judgement.kept.tolist() == [1, 2, 3, 4, 5]


def test_a_teacher_that_does_not_know_the_pairs_leaves_none_out() -> None:
    agreed = replace(known([0.1, 0.5, 0.5, 0.52, 0.48], 0.4), own_wins=Interval(0.55, 0.5, 0.6))
    assert len(judged(statistics(5), agreed=agreed).kept) == 5
    assert len(judged(statistics(5), agreed=replace(agreed, own_wins=None)).kept) == 5


@pytest.mark.parametrize(
    ("rules", "column", "values", "kept"),
    [
        (KeepRules(min_side=5), "short_side", [4, 5, 6], [1, 2]),
        (KeepRules(max_aspect=2), "long_side", [1, 2, 3], [0, 1]),
        (KeepRules(min_sharpness=5), "sharpness", [4, 5, 6], [1, 2]),
        (KeepRules(min_contrast=0.2), "contrast", [0.1, 0.3, 0.4], [1, 2]),
        (KeepRules(max_noise=5), "noise", [4, 5, 6], [0, 1]),
        (KeepRules(min_brightness=0.3, max_brightness=0.6), "brightness", [0.2, 0.5, 0.7], [1]),
    ],
)
def test_rules_that_are_asked_for(
    rules: KeepRules, column: str, values: list[float], kept: list[int]
) -> None:
    found = statistics(3, **{column: values})
    assert judged(found, rules=rules).kept.tolist() == kept
    assert judged(found).kept.tolist() == [0, 1, 2]


def test_captions_of_too_many_pictures_are_left_out_if_asked_for() -> None:
    captions = captions_of([("a photo",), ("a photo",), ("a photo", "a cat"), ("a cat",)])
    assert judged(
        statistics(4), captions=captions, rules=KeepRules(max_repeated=2)
    ).kept.tolist() == [3]


def test_a_rule_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="--min-side must be 0 or above, got -1"):
        KeepRules(min_side=-1)
