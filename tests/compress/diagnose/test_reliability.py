import math

import numpy as np
import pytest

from edgeclip.compress.diagnose.reliability import (
    best_answers,
    calibration,
    calibration_error,
    dead_leaves,
    separation,
)
from edgeclip.runtime.quality.relevance import Relevance


def test_calibration_error_by_hand() -> None:
    confidence = np.repeat([0.5, 0.9], 15)
    right = np.array([True, False] * 7 + [True] + [True] * 15)
    # Fifteen bins of two each: of the first half seven hold one hit and one miss.
    halves = [abs(0.5 - right[at : at + 2].mean()) for at in range(0, 14, 2)]
    middle = abs((0.5 + 0.9) / 2 - right[14:16].mean())
    rest = 7 * 0.1
    assert calibration_error(confidence, right) == pytest.approx((sum(halves) + middle + rest) / 15)


def test_a_model_that_is_too_sure_is_told_the_temperature() -> None:
    rng = np.random.default_rng(0)
    texts = np.eye(8)
    truth = rng.integers(0, 8, 1500)
    cosines = texts[truth] + rng.normal(size=(1500, 8))
    # The likelihood ratio of unit noise is exp(cosine): a scale of 1 is calibrated, 3 is not.
    owner = np.arange(1500)
    relevance = Relevance(1500, owner, truth.astype(np.int64))
    given = cosines, texts[truth], relevance
    sure, plain = calibration(*given, 3.0), calibration(*given, 1.0)
    assert plain.error < plain.limit
    assert plain.confidence_above_accuracy.low < 0 < plain.confidence_above_accuracy.high
    assert sure.error > sure.limit
    assert sure.confidence_above_accuracy.low > 0
    assert sure.temperature == pytest.approx(3, rel=0.15)


def test_a_temperature_at_the_end_of_the_search_is_no_optimum() -> None:
    texts = np.eye(2)
    truth = np.arange(200) % 2
    relevance = Relevance(200, np.arange(200), truth)
    right, wrong = texts[truth], texts[1 - truth]
    mixed = np.where(np.arange(200)[:, None] % 8 < 2, wrong, right)
    # Three of four are right, so that the odds should be 3: 1 / log 3 at a scale of 1.
    told = [
        calibration(image, texts[truth], relevance, 1.0).temperature_told
        for image in (wrong, mixed, right)
    ]
    assert told == ["at least 20.0", "0.910", "at most 0.0500"]


def test_the_best_answer_by_hand() -> None:
    image, text = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [0, 1]])
    confidence, right = best_answers(image, text, Relevance.of_pairs(2), 2.0)
    assert confidence == pytest.approx([1 / (1 + math.exp(-2))] * 2)
    assert right.all()


def test_separation_by_hand_and_its_interval() -> None:
    found = separation(np.array([3.0, 2, 1]), np.array([2.0, 0]))
    assert found.area == pytest.approx((1 + 0.75 + 0.5) / 3)
    # DeLong: variances of (1, 0.75, 0.5) over 3 and of (0.5, 1) over 2.
    assert found.estimate().error == pytest.approx(math.sqrt(0.0625 / 3 + 0.125 / 2))
    assert found.above(found).interval.value == 0
    rng = np.random.default_rng(0)
    chance = separation(rng.normal(size=200), rng.normal(size=200)).estimate().interval
    assert chance.low < 0.5 < chance.high


def test_leaves_are_drawn_the_same_by_seed() -> None:
    first, again, other = (dead_leaves(1, 32, seed=seed)[0].tobytes() for seed in (0, 0, 1))
    assert first == again != other
