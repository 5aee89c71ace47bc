"""Guarantees by simulation: how often a certificate is wrong, and how often one is found."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.export.cascade.certify import (
    PValue,
    betting,
    choose_threshold,
    fixed_sequence,
    hoeffding_bentkus,
    share_error,
)
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    ESCALATE_NONE,
    PairedOutcomes,
    needs_teacher,
    threshold_grid,
)
from edgeclip.runtime.errors import InputError

BOUND, DELTA = 0.95, 0.05
TESTS = (betting, hoeffding_bentkus)


def surplus(
    rng: np.random.Generator, count: int, *, harm: float, both: float, gain: float
) -> Values:
    """Right answers of a cascade minus `BOUND` times the teacher's, with planted shares."""
    shares = (harm, both, gain, 1 - harm - both - gain)
    return rng.choice([-BOUND, 1 - BOUND, 1.0, 0.0], p=shares, size=count)


def planted(rng: np.random.Generator, count: int, *, wrong_below: float) -> PairedOutcomes:
    """A trial with uniform scores; the teacher is right in 90%.

    The student is right with it, but in a part of the queries that it scores below
    `wrong_below`. So a cascade keeps 1 - (wrong_below - threshold) / 2 of the teacher's quality.
    """
    scores = rng.random(count)
    teacher = rng.random(count) < 0.9
    student = teacher & ((scores >= wrong_below) | (rng.random(count) < 0.5))
    return PairedOutcomes(scores=scores, student=student, escalated=teacher, teacher=teacher)


GRID = (ESCALATE_ALL, *(1 - np.arange(1, 40) / 40), ESCALATE_NONE)


class TestPValues:
    @pytest.mark.parametrize("p_value", TESTS)
    def test_small_at_most_as_often_as_they_say(self, p_value: PValue) -> None:
        rng = np.random.default_rng(1)
        both, gain = 0.8, 0.01
        harm = ((1 - BOUND) * both + gain) / BOUND  # the mean is 0: the edge of the null
        found = np.array(
            [
                p_value(surplus(rng, 400, harm=harm, both=both, gain=gain), -BOUND, 1.0)
                for _ in range(1000)
            ]
        )
        for level in (0.01, 0.05, 0.2):
            assert (found <= level).mean() <= level

    def test_betting_is_the_tighter_one(self) -> None:
        rng = np.random.default_rng(2)
        for _ in range(20):
            values = surplus(rng, 1000, harm=0.015, both=0.9, gain=0.005)
            assert betting(values, -BOUND, 1.0) < 0.01
            assert hoeffding_bentkus(values, -BOUND, 1.0) > 0.05

    def test_hoeffding_bentkus_by_hand(self) -> None:
        values = np.array([1.0] * 9 + [-1.0])
        # Losses in [0, 1]: 1 of 10 lost where the null says 5 of 10 or more.
        binomial = (1 + 10) / 2**10
        entropy = 0.1 * math.log(0.2) + 0.9 * math.log(1.8)
        expected = min(math.e * binomial, math.exp(-10 * entropy))
        assert hoeffding_bentkus(values, -1.0, 1.0) == pytest.approx(expected)

    @given(st.lists(st.sampled_from([-0.95, 0.0, 0.05, 1.0]), min_size=1, max_size=60))
    def test_are_probabilities(self, values: list[float]) -> None:
        for p_value in TESTS:
            assert 0 <= p_value(np.array(values), -0.95, 1.0) <= 1

    def test_nothing_is_certain_of_losses(self) -> None:
        for p_value in TESTS:
            assert p_value(np.full(50, -BOUND), -BOUND, 1.0) == 1.0
        with pytest.raises(ValueError, match="low"):
            betting(np.ones(3), 0.0, 1.0)


class TestFixedSequence:
    def test_stops_at_the_first_that_is_not_rejected(self) -> None:
        assert fixed_sequence([0.01, 0.05, 0.06, 0.0], 0.05) == 2
        assert fixed_sequence([0.5, 0.0], 0.05) == 0
        assert fixed_sequence([], 0.05) == 0

    def test_wrong_certificates_are_rare(self) -> None:
        """Whatever threshold is chosen, it keeps less than promised in at most delta of trials."""
        wrong_below = 0.3
        # A threshold t keeps 1 - (0.3 - t) / 2: below t = 0.2 that is less than 95%.
        wrong = certified = 0
        for seed in range(1000):
            trial = planted(np.random.default_rng(seed), 400, wrong_below=wrong_below)
            found = choose_threshold(trial, GRID, bound=BOUND, delta=DELTA)
            if found is not None:
                certified += 1
                wrong += found.threshold < 0.2 - 1e-9
        assert wrong <= DELTA * 1000
        assert certified >= 0.99 * 1000

    def test_a_student_just_below_the_bound_is_rarely_trusted(self) -> None:
        wrong = 0
        for seed in range(1000):
            rng = np.random.default_rng(seed)
            teacher = rng.random(600) < 0.9
            student = teacher & (rng.random(600) < 0.949)
            trial = PairedOutcomes(
                scores=rng.random(600), student=student, escalated=teacher, teacher=teacher
            )
            found = choose_threshold(trial, (ESCALATE_ALL, ESCALATE_NONE), bound=BOUND, delta=DELTA)
            assert found is not None  # everything escalated is as good as the teacher
            wrong += found.threshold == ESCALATE_NONE
        assert 0 < wrong <= DELTA * 1000

    def test_power_where_quality_is_above(self) -> None:
        """With 2,000 queries the threshold is at most 0.07 more cautious than it need be."""
        found = [
            choose_threshold(
                planted(np.random.default_rng(seed), 2000, wrong_below=0.3),
                GRID,
                bound=BOUND,
                delta=DELTA,
            )
            for seed in range(60)
        ]
        chosen = np.array([item.threshold for item in found if item is not None])
        assert len(chosen) == 60
        assert np.median(chosen) <= 0.25
        assert (chosen <= 0.27 + 1e-9).mean() >= 0.9

    def test_more_power_than_hoeffding_bentkus(self) -> None:
        trial = planted(np.random.default_rng(0), 2000, wrong_below=0.3)
        ours = choose_threshold(trial, GRID, bound=BOUND, delta=DELTA)
        theirs = choose_threshold(trial, GRID, bound=BOUND, delta=DELTA, p_value=hoeffding_bentkus)
        assert ours is not None
        assert theirs is None  # not even "escalate all", which keeps everything

    def test_a_student_as_good_as_its_teacher_escalates_nothing(self) -> None:
        rng = np.random.default_rng(0)
        teacher = rng.random(500) < 0.9
        trial = PairedOutcomes(
            scores=rng.random(500), student=teacher, escalated=teacher, teacher=teacher
        )
        found = choose_threshold(trial, GRID, bound=BOUND, delta=DELTA)
        assert found is not None
        assert found.threshold == ESCALATE_NONE
        assert found.certified == len(GRID)

    def test_too_few_queries_certify_nothing(self) -> None:
        trial = planted(np.random.default_rng(0), 20, wrong_below=0.3)
        assert choose_threshold(trial, GRID, bound=BOUND, delta=DELTA) is None

    def test_is_deterministic(self) -> None:
        trial = planted(np.random.default_rng(3), 500, wrong_below=0.3)
        first = choose_threshold(trial, GRID, bound=BOUND, delta=DELTA)
        assert first == choose_threshold(trial, GRID, bound=BOUND, delta=DELTA)


def test_share_error_covers_all_thresholds_at_once() -> None:
    error = share_error(300, 0.1)
    levels = np.linspace(0, 1, 101)
    missed = 0
    for seed in range(400):
        seen = (np.random.default_rng(seed).random(300)[:, None] < levels).mean(axis=0)
        missed += bool(np.abs(seen - levels).max() > error)
    assert missed <= 0.1 * 400


class TestTrial:
    def test_unsure_goes_to_the_teacher(self) -> None:
        scores = np.array([0.1, 0.5, 0.9, np.nan])
        assert needs_teacher(scores, 0.5).tolist() == [True, False, False, True]
        trial = PairedOutcomes(
            scores=scores,
            student=np.array([False, False, True, False]),
            escalated=np.array([True, True, False, True]),
            teacher=np.array([True, False, False, True]),
        )
        assert trial.right(0.5).tolist() == [True, False, True, True]
        assert trial.escalated_share(0.5) == 0.5
        assert trial.surplus(0.5, 0.95) == pytest.approx([0.05, 0.0, 1.0, 0.05])
        assert trial.right(ESCALATE_ALL).tolist() == trial.escalated.tolist()

    def test_arrays_that_do_not_fit_are_refused(self) -> None:
        flags = np.ones(3, dtype=np.bool_)
        with pytest.raises(InputError, match="one score"):
            PairedOutcomes(scores=np.zeros(2), student=flags, escalated=flags, teacher=flags)

    @given(st.lists(st.floats(-1, 2), min_size=1, max_size=40))
    def test_grid_descends_between_all_and_none(self, scores: list[float]) -> None:
        grid = threshold_grid(np.array(scores))
        assert grid[0] == ESCALATE_ALL
        assert grid[-1] == ESCALATE_NONE
        assert list(grid) == sorted(set(grid), reverse=True)

    def test_grid_needs_finite_scores(self) -> None:
        for wrong in (np.array([]), np.array([0.1, np.nan])):
            with pytest.raises(InputError, match="calibration scores"):
                threshold_grid(wrong)
