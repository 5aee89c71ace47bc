from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality import retrieval as module
from edgeclip.runtime.quality.retrieval import (
    TIE,
    DirectionMetrics,
    Ranks,
    ZeroShot,
    label_ranks,
    pair_ranks,
    retrieval,
    retrieval_of_ranks,
    zero_shot,
)
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share


def angles(*degrees: float) -> NDArray[np.float32]:
    """Unit vectors in the plane."""
    radians = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def slow_ranks(queries: NDArray[Any], targets: NDArray[Any], right: NDArray[Any]) -> list[int]:
    ranks = []
    for query, own in zip(queries.astype(float), right, strict=True):
        scores = []
        for target in targets.astype(float):
            lengths = np.sqrt(sum(query * query)) * np.sqrt(sum(target * target))
            scores.append(sum(query * target) / lengths)
        ranks.append(sum(score >= scores[own] - TIE for score in scores))
    return ranks


def test_retrieval_by_hand() -> None:
    # Image at 0: texts at 10, 25, 80 come in that order; at 20: 25, 10, 80; at 40: 25, 10, 80.
    ranks = pair_ranks(angles(0, 20, 40), angles(10, 25, 80))
    assert ranks.image_to_text.tolist() == [1, 1, 3]
    # Text at 10: images 0 and 20 tie, so pessimistically second; at 25: 20; at 80: 40.
    assert ranks.text_to_image.tolist() == [2, 1, 1]
    assert ranks.hits(1).tolist() == [0.5, 1.0, 0.5]
    result = retrieval(angles(0, 20, 40), angles(10, 25, 80))
    assert result.image_to_text == DirectionMetrics(
        r1=2 / 3, r5=1.0, r10=1.0, median_rank=1.0, mean_rank=5 / 3
    )
    assert result.text_to_image.mean_rank == pytest.approx(4 / 3)
    assert result.mean_r1 == pytest.approx(2 / 3)
    assert ranks.hits(1).mean() == pytest.approx(result.mean_r1)


def test_recall_at_five_and_ten() -> None:
    # Images at 0..19; text i at angle i + shift, so its own image ranks by distance.
    own = np.arange(20.0)
    shifts = np.zeros(20)
    shifts[0], shifts[1] = 3.4, 7.4  # nearest image is 3, then 4, 2, ...: own is 7th
    ranks = pair_ranks(angles(*own), angles(*(own + shifts)))
    assert ranks.text_to_image[:3].tolist() == [7, 15, 1]
    metrics = retrieval(angles(*own), angles(*(own + shifts))).text_to_image
    assert (metrics.r1, metrics.r5, metrics.r10) == (0.9, 0.9, 0.95)
    assert metrics.median_rank == 1.0


def test_recall_counts_the_rank_at_its_edge() -> None:
    result = retrieval_of_ranks(Ranks(np.array([1, 2, 5, 6]), np.array([1, 10, 10, 11])))
    assert result.image_to_text == DirectionMetrics(
        r1=0.25, r5=0.75, r10=1.0, median_rank=3.5, mean_rank=3.5
    )
    assert result.text_to_image == DirectionMetrics(
        r1=0.25, r5=0.25, r10=0.75, median_rank=10.0, mean_rank=8.0
    )


@pytest.mark.parametrize("count", [1, 7, 33, 130])
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_constant_embeddings_are_the_worst_not_the_best(count: int, dim: int) -> None:
    row = np.random.default_rng(dim).normal(size=(1, dim)).astype(np.float32)
    constant = np.repeat(row, count, axis=0)
    ranks = pair_ranks(constant, constant)
    assert (ranks.image_to_text == count).all()
    assert (ranks.text_to_image == count).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_ranks_equal_a_slow_loop(count: int, dim: int, seed: int, coarse: bool) -> None:
    generator = np.random.default_rng(seed)
    images, texts = generator.normal(size=(2, count, dim))
    if coarse:  # many ties
        images, texts = np.sign(images), np.sign(texts)
    own = np.arange(count)
    ranks = pair_ranks(images, texts)
    assert ranks.image_to_text.tolist() == slow_ranks(images, texts, own)
    assert ranks.text_to_image.tolist() == slow_ranks(texts, images, own)
    labels = generator.integers(0, count, size=count)
    assert label_ranks(images, texts, labels).tolist() == slow_ranks(images, texts, labels)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = np.random.default_rng(0).normal(size=(2, 50, 8))
    whole = pair_ranks(images, texts)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 120)
    chunked = pair_ranks(images, texts)
    assert np.array_equal(whole.image_to_text, chunked.image_to_text)
    assert np.array_equal(whole.text_to_image, chunked.text_to_image)


def test_lengths_do_not_matter() -> None:
    images, texts = np.random.default_rng(0).normal(size=(2, 20, 4))
    scales = np.linspace(0.1, 9, 20)[:, None]
    assert retrieval(images * scales, texts / scales) == retrieval(images, texts)


def test_zero_shot_by_hand() -> None:
    classes = angles(0, 20, 40, 60, 80, 100)
    images = angles(1, 42, 99, 99)
    # The last image, at 99, has class 0 as its sixth; the third has class 80 as its second.
    assert zero_shot(images, classes, np.array([0, 2, 4, 0])) == ZeroShot(top1=0.5, top5=0.75)


def test_cosines_by_hand() -> None:
    assert cosines(angles(0, 30, 10), angles(60, 30, 190)) == pytest.approx([0.5, 1, -1], abs=1e-6)
    assert cosines(angles(0) * 3, angles(0) / 7).max() <= 1.0


def test_retention_with_its_interval() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(300, 16))
    texts = images + generator.normal(scale=0.9, size=images.shape)
    weaker = images + generator.normal(scale=0.5, size=images.shape)
    teacher, student = pair_ranks(images, texts).hits(1), pair_ranks(weaker, texts).hits(1)
    retention = estimate_kept(student, teacher).interval
    assert retention.value == pytest.approx(student.mean() / teacher.mean())
    assert retention.low < retention.value < retention.high < 1
    assert estimate_share(teacher).value == pytest.approx(retrieval(images, texts).mean_r1)


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), r"shapes \(3, 2\) and \(4, 2\)"),
        (np.ones((3, 2)), np.ones((3, 4)), "shapes"),
        (np.ones(3), np.ones(3), r"array\[None\]"),
        (np.ones((0, 2)), np.ones((0, 2)), "at least one row"),
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), "NaN or infinity in 1 of 1 rows of the first"),
        (np.ones((1, 2)), np.array([[np.inf, 1.0]]), "rows of the second embeddings"),
        (np.zeros((1, 2)), np.ones((1, 2)), "length 0"),
        (np.ones((2, 2), np.int64), np.ones((2, 2)), "floats, not int64"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "floats, not list"),
    ],
)
def test_bad_embeddings_are_refused(images: Any, texts: Any, message: str) -> None:
    for measure in (retrieval, cosines):
        with pytest.raises(InputError, match=message):
            measure(images, texts)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "give 3 integers"),
        ([0.0, 1.0, 1.0], "give 3 integers"),
        ([0, 1, 2], "classes go from 0 to 1"),
        ([0, -1, 1], "span -1 to 1"),
    ],
)
def test_bad_labels_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zero_shot(angles(0, 1, 2), angles(0, 90), np.array(labels))


def test_classes_of_another_dimension_are_refused() -> None:
    with pytest.raises(InputError, match="2 dimensions, label embeddings 3"):
        zero_shot(angles(0), np.ones((4, 3)), np.array([0]))
