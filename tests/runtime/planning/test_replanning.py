import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import Objective
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions
from edgeclip.runtime.planning.link_state import LinkState, draw_exchange, draw_link
from edgeclip.runtime.planning.replanning import AdaptivePlan, Hysteresis, LinkEstimator
from edgeclip.runtime.planning.stage_times import StageTimes
from tests.runtime.conftest import Clock
from tests.runtime.planning.made_up_times import made_up
from tests.runtime.planning.test_link_state import PLAIN, exchange_ms

pytestmark = pytest.mark.slow

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
        after = chosen.update(now, costs)
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
        assert chosen.update(float(now), dict(zip(NAMES, values, strict=True))) == "a"


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 0.5))
def test_never_flaps_between_equals_however_noisy(seed: int, spread: float) -> None:
    noise = np.random.default_rng(seed).lognormal(0, spread, (600, 2))
    chosen, changes, before = Hysteresis("a", gain=0.1, dwell_s=30), 0, "a"
    for now, (a, b) in enumerate(100 * noise):
        after = chosen.update(float(now), {"a": float(a), "b": float(b)})
        changes += after != before
        before = after
    assert changes == 0


def test_lasting_gain_is_taken_once_and_kept() -> None:
    chosen = Hysteresis("a", gain=0.1, dwell_s=10)
    seen = [chosen.update(float(now), {"a": 100.0, "b": 80.0}) for now in range(30)]
    assert seen == ["a"] * 10 + ["b"] * 20


def test_interrupted_gain_begins_anew() -> None:
    chosen = Hysteresis("a", gain=0.1, dwell_s=10)
    for now in range(40):
        cheap = 95.0 if now % 9 == 8 else 80.0
        assert chosen.update(float(now), {"a": 100.0, "b": cheap}) == "a"


def test_choice_that_is_gone_is_replaced_at_once() -> None:
    chosen = Hysteresis("a")
    assert chosen.update(0.0, {"b": 3.0, "c": 2.0}) == "c"


@given(
    mbps=st.sampled_from([0.5, 2.0, 8.0, 30.0, 100.0]),
    rtt=st.floats(1, 100),
    assumed_mbps=st.floats(0.5, 500),
    assumed_rtt=st.floats(1, 100),
)
def test_estimator_finds_the_link_that_made_its_observations(
    mbps: float, rtt: float, assumed_mbps: float, assumed_rtt: float
) -> None:
    true = LinkState(name="true", rtt_ms=(rtt,), up_mbps=(mbps,), down_mbps=(100.0,))
    assumed = LinkState(
        name="assumed", rtt_ms=(assumed_rtt,), up_mbps=(assumed_mbps,), down_mbps=(100.0,)
    )
    estimator = LinkEstimator(assumed, clock=Clock())
    for size in (200, 40_000, 200, 40_000):
        took = exchange_ms(true, size, 100)
        estimator.observe(sent=size, received=100, network_ms=took)
    found = estimator.state()
    for size in (500, 10_000, 40_000):
        assert exchange_ms(found, size, 100) == pytest.approx(exchange_ms(true, size, 100), rel=0.1)


def test_estimator_pairs_what_one_moment_showed() -> None:
    """Round trip and bandwidth that move together, told by a small and a large request each."""
    clock, rng = Clock(), np.random.default_rng(0)
    estimator = LinkEstimator(PLAIN, max_age_s=1e6, clock=clock)
    moments = []
    for busy in rng.normal(0, 0.5, 40):
        rtt, mbps = 20 * np.exp(busy), 2 * np.exp(-busy)
        moments.append((rtt, mbps))
        true = LinkState(name="now", rtt_ms=(rtt,), up_mbps=(mbps,), down_mbps=(16.0,))
        for size in (100, 40_000):
            clock.now += 0.1
            estimator.observe(sent=size, received=100, network_ms=exchange_ms(true, size, 100))
        clock.now += 5.0
    found = estimator.state()
    assert found.moments == 80
    drawn = draw_link(found, 8000, np.random.default_rng(0))
    assert np.corrcoef(np.log(drawn.rtt), np.log(drawn.up))[0, 1] < -0.95
    sent, received = np.full(8000, 40_000.0), np.full(8000, 100.0)
    took = draw_exchange(found, drawn, sent, received, rng).total
    right = [
        exchange_ms(LinkState(name="x", rtt_ms=(rtt,), up_mbps=(mbps,), down_mbps=(16.0,)), 40_000)
        for rtt, mbps in moments
    ]
    for percent in (5, 50, 95):
        assert np.percentile(took, percent) == pytest.approx(np.percentile(right, percent), rel=0.1)


def test_a_bandwidth_that_varies_around_the_assumed_one_is_seen() -> None:
    clock = Clock()
    estimator = LinkEstimator(PLAIN, clock=clock)
    for mbps in (4.0, 8.0, 16.0) * 5:
        true = LinkState(name="now", rtt_ms=(20.0,), up_mbps=(mbps,), down_mbps=(16.0,))
        for size in (100, 40_000):
            clock.now += 0.1
            estimator.observe(sent=size, received=100, network_ms=exchange_ms(true, size, 100))
    assert np.percentile(estimator.state().up_mbps, [10, 90]) == pytest.approx([4, 16], rel=0.1)


def test_estimator_forgets_and_falls_back() -> None:
    clock = Clock()
    estimator = LinkEstimator(PLAIN, max_age_s=10, clock=clock)
    assert estimator.state().rtt_ms == PLAIN.rtt_ms
    estimator.observe(sent=100, received=100, network_ms=55.0)
    assert estimator.state().rtt_ms[0] == pytest.approx(55, abs=2)
    clock.now = 11.0
    assert estimator.state().rtt_ms == PLAIN.rtt_ms


def test_noise_larger_than_the_bytes_moves_no_bandwidth() -> None:
    rng = np.random.default_rng(0)
    estimator = LinkEstimator(PLAIN, clock=Clock())
    for _ in range(30):
        for size in (200, 6000):
            took = exchange_ms(PLAIN, size, 100) + rng.exponential(10.0)
            estimator.observe(sent=size, received=100, network_ms=took)
    assert estimator.state().up_mbps == PLAIN.up_mbps


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1, 1e5)), max_size=20))
def test_estimator_accepts_any_observation(seen: list[tuple[int, float]]) -> None:
    estimator = LinkEstimator(PLAIN, clock=Clock())
    for sent, network_ms in seen:
        estimator.observe(sent=sent, received=1000, network_ms=network_ms)
    assert np.isfinite(exchange_ms(estimator.state(), 10_000, 1000))


def test_a_timeout_counts_only_if_it_is_later_than_expected() -> None:
    estimator = LinkEstimator(PLAIN, clock=Clock())
    expected = exchange_ms(PLAIN, 40_000)
    estimator.observe_timeout(sent=40_000, network_ms=0.5 * expected)
    assert estimator.state().up_mbps == PLAIN.up_mbps
    estimator.observe_timeout(sent=40_000, network_ms=5 * expected)
    assert np.median(estimator.state().up_mbps) < 0.3 * PLAIN.up_mbps[0]


@pytest.fixture
def adaptive(emoji_cuts: CutSet, emoji_times: StageTimes, clock: Clock) -> AdaptivePlan:
    """A device 20 times slower than the server, on a link that is assumed to be good."""
    link = LinkState(name="good", rtt_ms=(5.0,), up_mbps=(50.0,), down_mbps=(50.0,))
    device = dataclasses.replace(made_up(emoji_times, slower=20.0), device="slow")
    return AdaptivePlan(
        emoji_cuts.manifest,
        device,
        made_up(emoji_times),
        PlanConditions(link=link, dim=256),
        Objective(),
        review_s=1.0,
        clock=clock,
    )


def observe(plan: AdaptivePlan, ms: float, *, server_ms: float | None = 0.0) -> None:
    plan.observe(sent=300, received=300, ms=ms, server_ms=server_ms, timed_out=False)


def test_follows_a_link_that_turns_bad_and_good_again(adaptive: AdaptivePlan, clock: Clock) -> None:
    assert adaptive.current.kind == "image"
    kinds = []
    for second in range(0, 180, 3):
        clock.now += 3.0
        bad = 20 <= second < 100
        observe(adaptive, 9_000.0 if bad else 8.0)
        kinds.append(adaptive.review().kind)
    assert kinds[:8] == ["image"] * 8
    assert "device" in kinds[10:36]
    assert kinds[-1] == "image"
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes == 2


def test_timeouts_end_a_plan_that_never_gets_an_answer(
    adaptive: AdaptivePlan, clock: Clock
) -> None:
    for _ in range(8):
        clock.now += 3.0
        adaptive.observe(sent=300, received=0, ms=3_000.0, server_ms=None, timed_out=True)
        adaptive.review()
    assert adaptive.current.kind == "device"


def test_what_the_server_works_is_not_the_link(adaptive: AdaptivePlan) -> None:
    observe(adaptive, 900.0, server_ms=880.0)
    assert np.median(adaptive.link.rtt_ms) == pytest.approx(20, abs=1)
    for _ in range(3):
        observe(adaptive, 60.0, server_ms=None)  # of which the plan predicts 40 ms of work
    assert np.median(adaptive.link.rtt_ms) == pytest.approx(20, abs=1)


def test_waits_that_the_server_shows_take_the_place_of_a_queue(
    adaptive: AdaptivePlan, clock: Clock
) -> None:
    work = 40.0  # of the server on a picture, in milliseconds
    for wait in [0.0] * 20 + [30.0] * 10:
        clock.now += 0.1
        observe(adaptive, 10.0 + work + wait, server_ms=work + wait)
    clock.now += 1.0
    before = adaptive.current
    after = adaptive.review()
    assert after.name == before.name
    assert after.p50_ms is not None
    assert after.p95_ms is not None
    assert after.p95_ms - after.p50_ms == pytest.approx(30, abs=2)


def test_the_work_of_other_requests_is_no_wait(adaptive: AdaptivePlan, clock: Clock) -> None:
    """Eight pictures in one request take the server eight times as long, and wait for nothing."""
    for _ in range(30):
        clock.now += 0.1
        adaptive.observe(
            sent=300,
            received=300,
            ms=10.0 + 8 * 40.0,
            server_ms=8 * 40.0,
            timed_out=False,
            is_predicted=False,
        )
    clock.now += 1.0
    after = adaptive.review()
    assert after.p50_ms is not None
    assert after.p50_ms < 100


def test_reviews_no_more_often_than_asked(adaptive: AdaptivePlan, clock: Clock) -> None:
    before = adaptive.current
    observe(adaptive, 500.0)
    clock.now += 0.5
    assert adaptive.review() is before
    clock.now += 1.0
    after = adaptive.review()
    assert after.name == before.name
    assert after.p95_ms != before.p95_ms


def test_an_excluded_plan_is_replaced_at_once(adaptive: AdaptivePlan, clock: Clock) -> None:
    before = adaptive.current
    adaptive.exclude(before)
    clock.now += 0.1
    assert adaptive.review().name != before.name
    for _ in range(8):
        clock.now += 3.0
        assert adaptive.review().name != before.name


def test_searches_are_refused(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    conditions = PlanConditions(link=PLAIN, dim=256, goal="search")
    times = made_up(emoji_times)
    with pytest.raises(InputError, match="use the goal 'embedding'"):
        AdaptivePlan(emoji_cuts.manifest, times, times, conditions, Objective())
