"""Bets on means: valid at every count, stronger with more evidence, and resumed where they were."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.betting import STAKES, RestartedBets, betting_p_value, stake_grid

LOW = -0.95
values_of = st.lists(st.sampled_from([LOW, 0.0, 0.05, 1.0]), max_size=60)


def surplus(rng: np.random.Generator, count: int, *, harm: float, gain: float) -> Values:
    shares = (harm, 0.8, gain, 0.2 - harm - gain)
    return rng.choice([LOW, 1 + LOW, 1.0, 0.0], p=shares, size=count)


def test_stakes_lose_less_than_everything() -> None:
    stakes = stake_grid(LOW)
    assert len(stakes) == STAKES
    assert (np.diff(stakes) > 0).all()
    assert (1 + stakes * LOW > 0).all()
    with pytest.raises(InputError, match="negative"):
        stake_grid(0.0)


def test_by_hand() -> None:
    stakes = stake_grid(-1.0)
    wealth = np.mean((1 + stakes) ** 3)
    assert betting_p_value(np.ones(3), -1.0) == pytest.approx(1 / wealth)
    after_loss = np.array([1.0, 1.0, 1.0, -1.0])  # the highest wealth counts, not the last
    assert betting_p_value(after_loss, -1.0) == pytest.approx(1 / wealth)


def test_small_at_most_as_often_as_it_says_however_long_one_looks() -> None:
    rng = np.random.default_rng(1)
    gain = 0.01
    harm = ((1 + LOW) * 0.8 + gain) / -LOW  # the mean is 0: the edge of the hypothesis
    found = np.array(
        [betting_p_value(surplus(rng, 400, harm=harm, gain=gain), LOW) for _ in range(1000)]
    )
    for level in (0.01, 0.05, 0.2):
        assert (found <= level).mean() <= level


@given(values_of)
def test_is_a_probability_that_never_grows(values: list[float]) -> None:
    so_far = [betting_p_value(np.array(values[:count]), LOW) for count in range(len(values) + 1)]
    assert all(0 < later <= earlier <= 1 for earlier, later in pairwise(so_far))


def test_refuses_a_value_below_the_least() -> None:
    assert betting_p_value(np.full(50, LOW), LOW) == 1.0
    with pytest.raises(InputError, match="below the least possible"):
        betting_p_value(np.array([-2.0]), LOW)


@given(values_of)
def test_restarted_bets_resume(values: list[float]) -> None:
    rows = [np.array([value, LOW - value]) for value in values]
    whole, half = RestartedBets([LOW, LOW - 1]), RestartedBets([LOW, LOW - 1])
    assert whole.wealth.tolist() == [1.0, 1.0]
    for row in rows:
        whole.bet(row)
    for row in rows[: len(rows) // 2]:
        half.bet(row)
    rest = RestartedBets([LOW, LOW - 1], half.capital, half.count)
    for row in rows[len(rows) // 2 :]:
        rest.bet(row)
    assert rest.wealth == pytest.approx(whole.wealth)


def test_restarted_bets_are_fair_and_find_a_late_change() -> None:
    won, lost = np.array([0.5]), np.array([-0.5])
    bets = RestartedBets([-0.5])
    for number in range(400):
        before = bets.wealth[0]
        both = [RestartedBets([-0.5], bets.capital, bets.count) for _ in range(2)]
        for one, value in zip(both, (won, lost), strict=True):
            one.bet(value)
        assert np.mean([one.wealth[0] for one in both]) == pytest.approx(before)
        bets.bet(won if number % 2 else lost)
    for _ in range(60):
        bets.bet(won)
    assert bets.wealth[0] > 1000


def test_nothing_to_lose_is_no_bet_and_damage_is_refused() -> None:
    idle = RestartedBets([0.0])
    for _ in range(20):
        idle.bet(np.array([0.3]))
    assert idle.wealth[0] == pytest.approx(1.0)
    for row in ([1.0], [-1.0] * STAKES, [float("nan")] * STAKES):
        with pytest.raises(InputError, match="capital"):
            RestartedBets([LOW], [row])
    with pytest.raises(InputError, match="1 rows"):
        RestartedBets([LOW], [[0.0] * STAKES] * 2)
