"""False alarms, delays and restarts of the drift detector, on streams with and without a shift."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.cascade.drift import (
    DriftDetector,
    DriftRule,
    DriftState,
    JumperMartingale,
    MartingaleState,
    ScoreSample,
)
from edgeclip.runtime.errors import InputError

pytestmark = pytest.mark.slow

ALPHA = 0.05


def sample(rng: np.random.Generator, count: int = 500) -> ScoreSample:
    """Scores as a margin has them: many small ones, a tail of large ones."""
    return ScoreSample.of(rng.beta(1, 4, 300), rng.beta(1, 4, count))


def watch(seed: int, rule: DriftRule | None = None) -> tuple[DriftDetector, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return DriftDetector(sample(rng), rule or DriftRule(alpha=ALPHA), seed=seed), rng


class TestMartingale:
    @given(st.lists(st.floats(0, 1), max_size=30))
    def test_capital_stays_positive_and_resumes(self, p_values: list[float]) -> None:
        bet = JumperMartingale()
        grown = sum(bet.bet(p_value) for p_value in p_values)
        assert bet.log_capital == pytest.approx(grown)
        assert JumperMartingale(bet.state).log_capital == pytest.approx(bet.log_capital)

    def test_one_bet_pays_one_on_average(self) -> None:
        """Whatever came before, the next bet is fair: its mean over uniform p-values is 1."""
        grid = (np.arange(2000) + 0.5) / 2000
        for before in ([], [0.01] * 20, [0.99, 0.02] * 10):
            start = JumperMartingale()
            for p_value in before:
                start.bet(p_value)
            paid = [np.exp(JumperMartingale(start.state).bet(p_value)) for p_value in grid]
            assert np.mean(paid) == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize("draw", ["low", "high", "ends", "middle"])
    def test_grows_whatever_is_wrong(self, draw: str) -> None:
        rng = np.random.default_rng(0)
        a, b = {"low": (1, 3), "high": (3, 1), "ends": (0.3, 0.3), "middle": (4, 4)}[draw]
        bet = JumperMartingale()
        for p_value in rng.beta(a, b, 200):
            bet.bet(float(p_value))
        assert bet.log_capital > np.log(1000)

    def test_damaged_capital_is_refused(self) -> None:
        good = MartingaleState()
        with pytest.raises(ValueError, match="another version"):
            MartingaleState(shares=good.shares[:1], logs=good.logs)
        with pytest.raises(ValueError, match="shares must be shares"):
            MartingaleState(shares=((2.0,) * len(good.shares[0]),) * len(good.shares))
        with pytest.raises(ValueError, match="finite"):
            MartingaleState(logs=(np.inf,) * len(good.logs))


class TestFalseAlarms:
    def test_without_drift_they_are_as_rare_as_alpha(self) -> None:
        raised = 0
        for seed in range(300):
            detector, rng = watch(seed)
            raised += detector.update(rng.beta(1, 4, 400))
        assert raised <= ALPHA * 300

    def test_also_of_scores_that_take_few_values(self) -> None:
        raised = 0
        for seed in range(150):
            rng = np.random.default_rng(seed)
            steps = np.round(rng.random(1000) * 4) / 4
            made = ScoreSample.of(steps[:200], steps[200:600])
            raised += DriftDetector(made, DriftRule(alpha=ALPHA), seed=seed).update(steps[600:])
        assert raised <= ALPHA * 150

    def test_of_the_endless_rule_come_late_on_average(self) -> None:
        """The mean time to a false alarm, streams cut short counted as they stand."""
        times = []
        for seed in range(60):
            detector, rng = watch(seed, DriftRule(mean_queries=300))
            for _ in range(4):
                if detector.update(rng.beta(1, 4, 300)):
                    break
            times.append(detector.alarm_at or detector.seen)
        assert np.mean(times) >= 300


class TestDetection:
    @pytest.mark.parametrize(
        "shift", [(1.0, 12.0), (3.0, 3.0), (0.3, 1.2)], ids=["lower", "higher", "wider"]
    )
    def test_a_shift_is_found_soon(self, shift: tuple[float, float]) -> None:
        delays = []
        for seed in range(20):
            detector, rng = watch(seed, DriftRule(alpha=0.01))
            assert not detector.update(rng.beta(1, 4, 200))
            detector.update(rng.beta(*shift, 300))
            delays.append(np.inf if detector.alarm_at is None else detector.alarm_at - 200)
        assert np.median(delays) <= 100
        assert np.max(delays) < np.inf

    def test_the_endless_rule_finds_a_late_shift_sooner(self) -> None:
        rng = np.random.default_rng(0)
        before, after = rng.beta(1, 4, 5000), rng.beta(1, 7, 1000)
        delays = []
        for rule in (DriftRule(alpha=1e-3), DriftRule(mean_queries=1e5)):
            detector = DriftDetector(sample(np.random.default_rng(1)), rule)
            assert not detector.update(before)
            detector.update(after)
            assert detector.alarm_at is not None
            delays.append(detector.alarm_at - 5000)
        assert delays[1] <= delays[0]

    def test_alarm_stays(self) -> None:
        detector, rng = watch(0)
        assert detector.update(np.zeros(200))
        first = detector.alarm_at
        assert detector.update(rng.beta(1, 4, 200))
        assert detector.alarm_at == first
        assert detector.seen == 400

    def test_scores_that_are_no_numbers_raise_it(self) -> None:
        detector, _ = watch(0)
        assert detector.update([float("nan")] * 100)


class TestState:
    @given(st.integers(0, 300), st.integers(0, 50))
    def test_a_resumed_watch_goes_on_as_if_nothing_happened(self, cut: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        made, stream = sample(rng), rng.beta(1, 5, 300)
        whole, first = DriftDetector(made, seed=seed), DriftDetector(made, seed=seed)
        whole.update(stream)
        first.update(stream[:cut])
        second = DriftDetector(made, state=first.state)
        second.update(stream[cut:])
        assert second.state.counts == whole.state.counts
        assert second.alarm_at == whole.alarm_at
        assert second.evidence == pytest.approx(whole.evidence)

    def test_is_a_small_file(self, tmp_path: Path) -> None:
        detector, rng = watch(3)
        detector.update(rng.beta(1, 4, 1000))
        path = tmp_path / "detector.json"
        detector.state.save(path)
        assert path.stat().st_size < 4096
        assert DriftState.load(path) == detector.state
        assert DriftState.load(tmp_path / "none.json") is None

    def test_damaged_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "detector.json"
        DriftState(seed=0, counts=(1, 2)).save(path)
        data = json.loads(path.read_text())
        for text in ("{", "\xff", json.dumps(data | {"seed": -1}), json.dumps(data | {"more": 1})):
            path.write_text(text, encoding="latin-1")
            with pytest.raises(InputError, match="delete it to start a new detector"):
                DriftState.load(path)

    def test_state_of_another_certificate_is_refused(self) -> None:
        detector, rng = watch(0)
        detector.update(rng.beta(1, 4, 10))
        other = sample(np.random.default_rng(99), 800)
        with pytest.raises(InputError, match="another certificate"):
            DriftDetector(other, state=detector.state)

    def test_same_seed_same_evidence(self) -> None:
        found = []
        for seed in (1, 1, 2):
            detector = DriftDetector(sample(np.random.default_rng(0)), seed=seed)
            detector.update(np.random.default_rng(5).beta(1, 4, 50))
            found.append(detector.evidence)
        assert found[0] == found[1] != found[2]


class TestSample:
    def test_counts_by_the_calibration_quantiles(self) -> None:
        made = ScoreSample.of(np.arange(1000) / 1000, np.array([0.0, 0.5, 0.999, 5.0]))
        assert len(made.edges) == 49
        assert sum(made.counts) == 4
        assert made.counts[-1] == 2

    def test_scores_that_are_all_alike(self) -> None:
        made = ScoreSample.of(np.ones(10), np.ones(5))
        assert made.counts == (0, 5)
        assert not DriftDetector(made).update(np.ones(500))

    def test_what_does_not_fit_is_refused(self) -> None:
        good = ScoreSample(edges=(0.1, 0.2), counts=(1, 2, 3))
        for change in ({"edges": (0.2, 0.1)}, {"counts": (1, 2)}, {"counts": (0, 0, 0)}):
            with pytest.raises(ValueError, match=r"edges|counts"):
                dataclasses.replace(good, **change)

    def test_rules_out_of_bounds_are_refused(self) -> None:
        for change in ({"alpha": 0.0}, {"alpha": 1.0}, {"mean_queries": 0.5}):
            with pytest.raises(ValueError, match=r"alpha|mean_queries"):
                DriftRule(**change)
