import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import Conditions
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.planner import Objective
from edgeclip.runtime.planning.replanning import Hysteresis, LivePlan
from edgeclip.runtime.planning.stage_times import StageTimes
from tests.runtime.conftest import Clock
from tests.runtime.planning.test_planner import made_up

NAMES = ("a", "b", "c")
COSTS = st.lists(
    st.tuples(st.floats(0.1, 5), st.tuples(*[st.floats(1, 100)] * 3)), min_size=1, max_size=60
)


@given(steps=COSTS, gain=st.floats(0, 0.5), dwell=st.floats(0.5, 20))
def test_changes_only_for_a_gain_that_lasted(
    steps: list[tuple[float, tuple[float, ...]]], gain: float, dwell: float
) -> None:
    chosen, now = Hysteresis("a", gain=gain, dwell_s=dwell), 0.0
    history: list[tuple[float, dict[str, float]]] = []
    last_change = 0.0
    for pause, values in steps:
        now += pause
        costs = dict(zip(NAMES, values, strict=True))
        before = chosen.current
        history.append((now, costs))
        after = chosen.step(now, costs)
        if after == before:
            continue
        assert now - last_change >= dwell or last_change == 0.0
        lasting = [(at, past) for at, past in history if now - at <= dwell and at > last_change]
        assert all(past[after] < (1 - gain) * past[before] for _, past in lasting)
        last_change = now


@given(
    data=st.lists(st.tuples(*[st.floats(100, 110)] * 3), min_size=1, max_size=100),
    dwell=st.floats(0, 5),
)
def test_noise_smaller_than_the_gain_changes_nothing(
    data: list[tuple[float, float, float]], dwell: float
) -> None:
    chosen = Hysteresis("a", gain=0.1, dwell_s=dwell)
    for now, values in enumerate(data):
        assert chosen.step(float(now), dict(zip(NAMES, values, strict=True))) == "a"


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 0.5))
def test_never_flaps_between_equals_however_noisy(seed: int, spread: float) -> None:
    noise = np.random.default_rng(seed).lognormal(0, spread, (600, 2))
    chosen, changes, before = Hysteresis("a", gain=0.1, dwell_s=30), 0, "a"
    for now, (a, b) in enumerate(100 * noise):
        after = chosen.step(float(now), {"a": float(a), "b": float(b)})
        changes += after != before
        before = after
    assert changes == 0


def test_lasting_gain_is_taken_once_and_kept() -> None:
    chosen = Hysteresis("a", gain=0.1, dwell_s=10)
    seen = [chosen.step(float(now), {"a": 100.0, "b": 80.0}) for now in range(30)]
    assert seen == ["a"] * 10 + ["b"] * 20


def test_interrupted_gain_begins_anew() -> None:
    chosen = Hysteresis("a", gain=0.1, dwell_s=10)
    for now in range(40):
        cheap = 95.0 if now % 9 == 8 else 80.0
        assert chosen.step(float(now), {"a": 100.0, "b": cheap}) == "a"


def test_choice_that_is_gone_is_replaced_at_once() -> None:
    chosen = Hysteresis("a")
    assert chosen.step(0.0, {"b": 3.0, "c": 2.0}) == "c"


@pytest.fixture
def live(emoji_cuts: CutSet, emoji_times: StageTimes, clock: Clock) -> LivePlan:
    """A device 20 times slower than the server, on a link that is assumed to be good."""
    link = LinkState(name="good", rtt_ms=(5.0,), up_mbps=(50.0,), down_mbps=(50.0,))
    device = dataclasses.replace(made_up(emoji_times, slower=20.0), device="slow")
    return LivePlan(
        emoji_cuts.manifest,
        device,
        made_up(emoji_times),
        Conditions(link=link, dim=256),
        Objective(),
        clock=clock,
    )


def test_follows_a_link_that_turns_bad_and_good_again(live: LivePlan, clock: Clock) -> None:
    assert live.current.kind == "image"
    kinds = []
    for second in range(200):
        clock.now += 1.0
        bad = 20 <= second < 100
        live.link.observe(sent=300, received=300, network_ms=9_000.0 if bad else 8.0)
        kinds.append(live.review().kind)
    assert kinds[:25] == ["image"] * 25
    assert "device" in kinds[30:110]
    assert kinds[-1] == "image"
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes == 2


def test_reviews_no_more_often_than_asked(live: LivePlan, clock: Clock) -> None:
    before = live.current
    live.link.observe(sent=300, received=300, network_ms=500.0)
    clock.now += 0.5
    assert live.review() is before
    clock.now += 1.0
    after = live.review()
    assert after.name == before.name
    assert after.p95_ms != before.p95_ms
    clock.now += 2.0
    assert live.review(utilisation=0.9).name == before.name
