"""Retrieval with equal captions and several captions an image, against slow implementations."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality import retrieval as module
from edgeclip.runtime.quality.relevance import Relevance, caption_key
from edgeclip.runtime.quality.retrieval import TIE, Ranks, pair_ranks, retrieval

Array = NDArray[np.float64]


def unit(array: Array) -> Array:
    scaled: Array = array / np.linalg.norm(array, axis=-1, keepdims=True)
    return scaled


def oracle(images: Array, texts: Array, captions: Sequence[Sequence[str]]) -> tuple[Any, Any]:
    """From the definition, one query and one target at a time; shares no code with the module."""
    flat = [(owner, text) for owner, own in enumerate(captions) for text in own]
    simple = [" ".join(text.lower().split()) for _, text in flat]
    held = [{" ".join(text.lower().split()) for text in own} for own in captions]

    def rank(scores: list[float], right: list[bool]) -> int:
        best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
        wrong = [score for score, is_right in zip(scores, right, strict=True) if not is_right]
        return 1 + sum(score >= best - TIE for score in wrong)

    a, b = unit(images), unit(texts)
    forward = [
        rank([float(a[i] @ b[t]) for t in range(len(flat))], [key in held[i] for key in simple])
        for i in range(len(captions))
    ]
    backward = [
        rank([float(a[i] @ b[t]) for i in range(len(captions))], [key in own for own in held])
        for t, key in enumerate(simple)
    ]
    return forward, backward


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 8), st.integers(0, 9999), st.booleans())
def test_ranks_are_those_of_the_definition(
    count: int, most: int, words: int, seed: int, coarse: bool
) -> None:
    draw = np.random.default_rng(seed)
    captions = [
        [
            f"{'A a'[n % 2 * 2]} word {draw.integers(words)}"
            for n in range(draw.integers(1, most + 1))
        ]
        for _ in range(count)
    ]
    total = sum(map(len, captions))
    images, texts = draw.normal(size=(count, 3)), draw.normal(size=(total, 3))
    if coarse:  # many ties
        images, texts = np.sign(images), np.sign(texts)
    ranks = pair_ranks(images, texts, Relevance.of_captions(captions))
    forward, backward = oracle(images, texts, captions)
    assert ranks.image_to_text.tolist() == forward
    assert ranks.text_to_image.tolist() == backward


def karpathy(images: Array, texts: Array, each: int) -> tuple[Any, Any]:
    """The usual evaluation of COCO and Flickr30k: sort, then look for the first of the captions."""
    scores = unit(images) @ unit(texts).T
    forward = []
    for index, row in enumerate(scores):
        order = np.argsort(-row).tolist()
        forward.append(1 + min(order.index(each * index + k) for k in range(each)))
    backward = []
    for number, column in enumerate(scores.T):
        backward.append(1 + np.argsort(-column).tolist().index(number // each))
    return np.array(forward), np.array(backward)


def test_five_captions_an_image_as_in_coco_and_flickr30k() -> None:
    draw = np.random.default_rng(1)
    images = draw.normal(size=(60, 8))
    texts = np.repeat(images, 5, axis=0) + draw.normal(scale=1.2, size=(300, 8))
    captions = [[f"caption {k} of {index}" for k in range(5)] for index in range(60)]
    forward, backward = karpathy(images, texts, 5)
    found = retrieval(images, texts, Relevance.of_captions(captions))
    for ours, ranks in ((found.image_to_text, forward), (found.text_to_image, backward)):
        assert (ours.r1, ours.r5, ours.r10) == tuple((ranks <= k).mean() for k in (1, 5, 10))
        assert (ours.median_rank, ours.mean_rank) == (np.median(ranks), ranks.mean())
    assert 0.2 < found.text_to_image.r1 < found.image_to_text.r1 < 1  # any of five is easier


def test_by_hand() -> None:
    # Image 0 is a dog, twice told; images 1 and 2 have one caption in common.
    relevance = Relevance.of_captions([["dog", "big dog"], ["cat"], ["Cat", "small cat"]])
    images = np.eye(3)
    texts = np.array(
        [
            [0.6, 0.8, 0.0],  # "dog" is nearest to image 1
            [1.0, 0.0, 0.0],
            [0.0, 0.0, 1.0],  # "cat" is nearest to image 2, which has that caption too
            [0.0, 1.0, 0.0],
            [0.0, 0.9, 0.4],  # "small cat" is nearest to image 1, which does not
        ]
    )
    ranks = pair_ranks(images, texts, relevance)
    assert ranks.image_to_text.tolist() == [1, 1, 1]
    assert ranks.text_to_image.tolist() == [2, 1, 1, 1, 2]
    assert ranks.image_hits(1).tolist() == [1, 1, 1]
    # Each image's hits, times 3 images / 5 captions.
    assert ranks.text_hits(1).tolist() == pytest.approx([0.6, 0.6, 0.6])
    assert ranks.hits(1).mean() == pytest.approx((1 + 3 / 5) / 2)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_perfect_model_is_perfect_however_often_a_caption_occurs(copies: int) -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(size=(12, 16))
    rows = np.repeat(base, copies, axis=0)
    noisy = rows + draw.normal(scale=1e-4, size=rows.shape)
    captions = [[f"Class  {index}"] for index in range(12) for _ in range(copies)]
    perfect = retrieval(noisy, rows, Relevance.of_captions(captions))
    assert (perfect.image_to_text.r1, perfect.text_to_image.r1) == (1, 1)
    assert retrieval(noisy, rows).mean_r1 == 1  # known by their equal embeddings
    random = retrieval(draw.normal(size=rows.shape), rows, Relevance.of_captions(captions))
    assert random.mean_r1 < 0.4


def test_a_collapsed_tower_is_the_worst_with_captions_too() -> None:
    captions = [[f"caption {k} of {index // 2}" for k in range(3)] for index in range(10)]
    ranks = pair_ranks(np.ones((10, 4)), np.ones((30, 4)), Relevance.of_captions(captions))
    assert (ranks.image_to_text == 1 + 30 - 6).all()
    assert (ranks.text_to_image == 1 + 10 - 2).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    captions = [[f"{draw.integers(6)}" for _ in range(1 + index % 3)] for index in range(20)]
    relevance = Relevance.of_captions(captions)
    images, texts = draw.normal(size=(20, 4)), draw.normal(size=(len(relevance.owner), 4))
    whole = pair_ranks(images, texts, relevance)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 100)
    chunked = pair_ranks(images, texts, relevance)
    assert np.array_equal(whole.image_to_text, chunked.image_to_text)
    assert np.array_equal(whole.text_to_image, chunked.text_to_image)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A Dog", " a\u2028dog\n", True),
        ("caf\u00e9", unicodedata.normalize("NFD", "CAF\u00c9"), True),
        ("STRASSE", "straße", True),
        ("a dog", "a dog.", False),
        ("a dog", "adog", False),
    ],
)
def test_which_captions_are_equal(one: str, other: str, equal: bool) -> None:
    assert (caption_key(one) == caption_key(other)) is equal


def test_chance_is_what_noise_finds() -> None:
    captions = [[f"class {index % 4}", f"{index}"] if index % 3 else ["all"] for index in range(24)]
    relevance = Relevance.of_captions(captions)
    draw = np.random.default_rng(0)
    found = [
        pair_ranks(
            draw.normal(size=(24, 6)), draw.normal(size=(len(relevance.owner), 6)), relevance
        ).hits(1)
        for _ in range(1500)
    ]
    assert np.mean(found) == pytest.approx(relevance.chance, abs=0.005)
    assert Relevance.of_pairs(50).chance == pytest.approx(1 / 50)


def test_captions_that_tell_nothing_are_refused() -> None:
    same = Relevance.of_captions([["a", "b"], ["b", "A"], ["a", "B"]])
    assert same.tells_nothing
    assert not Relevance.of_captions([["a", "b"], ["a"]]).tells_nothing
    assert not Relevance.of_captions([["a"]]).tells_nothing
    with pytest.raises(InputError, match="every text is right for every image"):
        retrieval(np.eye(3), np.ones((6, 3)), same)
    with pytest.raises(InputError, match="every text is right for every image"):
        retrieval(np.eye(3), np.ones((3, 3)))


def test_relevance_that_does_not_fit_is_refused() -> None:
    relevance = Relevance.of_captions([["a", "b"], ["c"]])
    with pytest.raises(InputError, match="not those of 2 images with 3 captions"):
        pair_ranks(np.eye(2), np.eye(2), relevance)
    with pytest.raises(InputError, match="every image needs a caption"):
        Relevance.of_captions([["a"], []])


def test_an_image_with_its_captions_is_one_item() -> None:
    ranks = Ranks(np.array([1, 2]), np.array([1, 1, 1, 7]), np.array([0, 0, 0, 1]))
    assert ranks.text_hits(1).tolist() == [1.5, 0]
    assert ranks.hits(1).mean() == pytest.approx((1 / 2 + 3 / 4) / 2)
