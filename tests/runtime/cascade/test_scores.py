"""Scores against their formulas, on cosines of real unit vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.cascade.certificate import ESCALATE_ALL, ESCALATE_NONE
from edgeclip.runtime.cascade.scores import (
    MAX_VIEWS,
    Agreement,
    Entropy,
    Margin,
    Score,
    Similarities,
    check_score,
    embed_views,
    view_pixels,
)
from edgeclip.runtime.errors import InputError

SCORES: tuple[Score, ...] = (
    Margin(),
    Entropy(logit_scale=40.0),
    Agreement(views=3),
    Agreement(views=3, measure="answer"),
)


def units(seed: int, *shape: int) -> FloatArray:
    found = np.random.default_rng(seed).normal(size=shape)
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    return found.astype(np.float32)


def evidence(seed: int = 0, *, queries: int = 5, entries: int = 7, views: int = 3) -> Similarities:
    dim = 4
    seen = units(seed + 2, views, queries, dim) if views else None
    return Similarities.between(units(seed, queries, dim), units(seed + 1, entries, dim), seen)


def test_margin_is_first_minus_second() -> None:
    found = Similarities.between(np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32))
    assert Margin().of(found).tolist() == [1.0, 1.0]
    cosines = np.array([[0.1, 0.7, 0.4], [0.5, 0.5, 0.2]])
    assert Margin().of(_plain(cosines)) == pytest.approx([0.3, 0.0])


def test_entropy_is_that_of_the_softmax() -> None:
    cosines = np.array([[0.1, 0.7, 0.4]])
    share = np.exp(5 * cosines[0]) / np.exp(5 * cosines[0]).sum()
    expected = 1 + (share * np.log(share)).sum() / np.log(3)
    assert Entropy(logit_scale=5.0).of(_plain(cosines)) == pytest.approx([expected])


def test_entropy_of_equal_and_of_certain_answers() -> None:
    equal = _plain(np.full((1, 9), 0.3))
    assert Entropy(logit_scale=50.0).of(equal) == pytest.approx([0.0], abs=1e-12)
    certain = _plain(np.array([[1.0, -1.0, -1.0]]))
    assert Entropy(logit_scale=1000.0).of(certain).tolist() == [1.0]  # no NaN from 0 x log 0


def test_agreement_of_views() -> None:
    query, entries = np.eye(2, dtype=np.float32)[:1], np.eye(2, dtype=np.float32)
    other = np.array([[0.6, 0.8]], dtype=np.float32)
    views = np.stack([query, query, other, query])
    found = Similarities.between(query, entries, views)
    assert Agreement(measure="answer").of(found).tolist() == [0.75]
    assert Agreement(measure="embedding").of(found) == pytest.approx([(1 + 1 + 0.6 + 1) / 4])


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 9))
def test_every_score_lies_between_the_outer_thresholds(seed: int, queries: int, rows: int) -> None:
    found = evidence(seed, queries=queries, entries=rows)
    for score in SCORES:
        values = score.of(found)
        assert values.shape == (queries,)
        assert values.dtype == np.float64
        assert ((values > ESCALATE_NONE) & (values < ESCALATE_ALL)).all()


@given(st.integers(0, 10_000))
def test_a_score_does_not_depend_on_the_batch_or_the_order_of_entries(seed: int) -> None:
    queries, entries, views = units(seed, 4, 5), units(seed + 1, 6, 5), units(seed + 2, 3, 4, 5)
    turned = np.random.default_rng(seed).permutation(6)
    for score in SCORES:
        together = score.of(Similarities.between(queries, entries, views))
        alone = [
            score.of(
                Similarities.between(queries[i : i + 1], entries[turned], views[:, i : i + 1])
            )[0]
            for i in range(4)
        ]
        assert together == pytest.approx(alone, abs=1e-6)


def test_a_surer_answer_scores_higher() -> None:
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    near = np.array([[0.8, 0.6], [0.6, 0.8]], dtype=np.float32)
    far = np.array([[0.8, 0.6], [-0.6, 0.8]], dtype=np.float32)
    for score in (Margin(), Entropy(logit_scale=10.0)):
        unsure = score.of(Similarities.between(query, near))[0]
        sure = score.of(Similarities.between(query, far))[0]
        assert sure > unsure


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="two entries"):
        Similarities.between(units(0, 2, 4), units(1, 1, 4))
    with pytest.raises(InputError, match="one embedding space"):
        Similarities.between(units(0, 2, 4), units(1, 3, 5))
    with pytest.raises(InputError, match="NaN"):
        Similarities.between(np.full((1, 4), np.nan, dtype=np.float32), units(1, 3, 4))
    with pytest.raises(InputError, match="needs 4 views"):
        Agreement(views=4).of(evidence(views=3))
    with pytest.raises(ValueError, match="1 to 10"):
        Agreement(views=0)
    with pytest.raises(ValueError, match="logit_scale"):
        Entropy(logit_scale=0.0)
    with pytest.raises(InputError, match="views"):
        check_score(Agreement(), "text")
    check_score(Margin(), "text")


def test_views_are_parts_at_full_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    views = view_pixels(pixels, MAX_VIEWS)
    assert views.shape == (MAX_VIEWS, 2, 16, 16, 3)
    assert len({view.tobytes() for view in views}) == MAX_VIEWS
    plain = np.full((1, 8, 8, 3), 77, dtype=np.uint8)
    assert (view_pixels(plain, 5) == 77).all()
    for wrong in (0, MAX_VIEWS + 1):
        with pytest.raises(InputError, match="views of a picture"):
            view_pixels(pixels, wrong)
    with pytest.raises(InputError, match="uint8"):
        view_pixels(pixels[0], 1)


def test_views_are_embedded_in_their_order() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    found = embed_views(lambda flat: flat.reshape(len(flat), -1)[:, :2], pixels, 4)
    assert found is not None
    assert found.tolist() == view_pixels(pixels, 4).reshape(4, 3, -1)[:, :, :2].tolist()
    assert embed_views(lambda flat: flat, pixels, 0) is None


def _plain(cosines: NDArray[np.float64]) -> Similarities:
    return Similarities(cosines, np.zeros((0, *cosines.shape)), np.zeros((0, len(cosines))))
