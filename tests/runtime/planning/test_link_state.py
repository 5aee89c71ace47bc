from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.device.link import LinkProfile, load_link
from edgeclip.runtime.planning.link_state import (
    HTTP_DOWN,
    HTTP_UP,
    SEGMENT,
    LinkState,
    draw_exchange,
    draw_link,
    slow_start_ms,
    transfer_ms,
)

PLAIN = LinkState(name="plain", rtt_ms=(20.0,), up_mbps=(8.0,), down_mbps=(16.0,))


def bytes_of(size: float, count: int = 1) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.full(count, size)


def exchange_ms(link: LinkState, sent: float, received: float = 0.0) -> float:
    rng = np.random.default_rng(0)
    return float(drawn_ms(link, bytes_of(sent), bytes_of(received), rng)[0])


def drawn_ms(link: LinkState, sent: Values, received: Values, rng: np.random.Generator) -> Values:
    drawn = draw_link(link, len(sent), rng)
    return draw_exchange(link, drawn, sent, received, rng).total


def test_small_request_takes_a_round_trip_and_its_bytes() -> None:
    expected = 20 + 8e-3 * (1000 + HTTP_UP) / 8 + 8e-3 * (500 + HTTP_DOWN) / 16
    assert exchange_ms(PLAIN, 1000, 500) == pytest.approx(expected)


def test_http_and_headers_count() -> None:
    link = LinkState(
        name="x",
        rtt_ms=(20.0,),
        up_mbps=(8.0,),
        down_mbps=(16.0,),
        efficiency=0.5,
        http_ms=1.5,
    )
    bytes_ms = exchange_ms(PLAIN, 1000, 500) - 20
    assert exchange_ms(link, 1000, 500) == pytest.approx(21.5 + 2 * bytes_ms)


@pytest.mark.parametrize(
    ("segments", "rounds"), [(1, 0), (10, 0), (11, 1), (30, 1), (31, 2), (70, 2), (71, 3)]
)
def test_window_doubles_every_round_trip(segments: int, rounds: int) -> None:
    # So fast a link that a window is sent in no time: each round costs a round trip.
    waited = slow_start_ms(bytes_of(segments), bytes_of(1e9), bytes_of(20.0))
    assert waited[0] == pytest.approx(20.0 * rounds, abs=1e-3)


def test_head_takes_a_segment_of_the_window() -> None:
    ten = transfer_ms(bytes_of(9 * SEGMENT), bytes_of(1e9), bytes_of(20.0), head=300, window=10)
    eleven = transfer_ms(
        bytes_of(9 * SEGMENT + 1), bytes_of(1e9), bytes_of(20.0), head=300, window=10
    )
    assert ten[0] == pytest.approx(0, abs=1e-3)
    assert eleven[0] == pytest.approx(20, abs=1e-3)


def test_full_link_does_not_wait_for_the_window() -> None:
    # Ten segments take longer than a round trip.
    waited = slow_start_ms(bytes_of(700), bytes_of(2.0), bytes_of(20.0))
    assert waited[0] == 0.0


@given(
    size=st.floats(1, 1e6), more=st.floats(0, 1e5), mbps=st.floats(0.1, 1000), rtt=st.floats(0, 300)
)
def test_more_bytes_never_arrive_sooner(size: float, more: float, mbps: float, rtt: float) -> None:
    def takes(sent: float) -> float:
        values = (bytes_of(sent), bytes_of(mbps), bytes_of(rtt))
        return float(transfer_ms(*values, head=300, window=10)[0])

    assert takes(size + more) >= takes(size) - 1e-9


def test_loss_costs_round_trips() -> None:
    count, rng = 20_000, np.random.default_rng(0)
    lossy = LinkState(name="lossy", rtt_ms=(20.0,), up_mbps=(8.0,), down_mbps=(16.0,), loss=0.1)
    sent, received = bytes_of(9 * SEGMENT, count), bytes_of(100.0, count)
    exact = drawn_ms(PLAIN, sent, received, rng)
    extra = drawn_ms(lossy, sent, received, rng) - exact
    # Nine segments come before the last one there, and one on the way back; a last one that
    # is lost takes 2 round trips and the timers. A window of sqrt(15) takes three rounds for
    # ten segments.
    waits = 2 * (20 - 8e-3 * np.sqrt(15) * SEGMENT / 8)
    expected = (1 - 0.9**9) * 25 + 0.1 * 25 + 2 * 0.1 * (42 + 100) + waits
    assert extra.mean() == pytest.approx(expected, rel=0.03)


def test_observed_moments_are_drawn_whole() -> None:
    link = LinkState(
        name="x", rtt_ms=(10.0, 20.0, 90.0), up_mbps=(8.0, 4.0, 6.0), down_mbps=(9.0,), moments=3
    )
    drawn = draw_link(link, 300, np.random.default_rng(0))
    pairs, times = np.unique(np.stack([drawn.rtt, drawn.up]), axis=1, return_counts=True)
    assert set(zip(*pairs.tolist(), strict=True)) == {(10.0, 8.0), (20.0, 4.0), (90.0, 6.0)}
    assert set(times) == {100}  # each as often as the others
    assert set(drawn.down) == {9.0}


def test_of_separate_spreads_the_slowest_round_trip_meets_the_lowest_bandwidth() -> None:
    link = LinkState(name="x", rtt_ms=(90.0, 10.0), up_mbps=(8.0, 1.0, 4.0), down_mbps=(2.0, 5.0))
    drawn = draw_link(link, 600, np.random.default_rng(0))
    assert set(drawn.up[drawn.rtt == 10]) == {8.0, 4.0}
    assert set(drawn.up[drawn.rtt == 90]) == {4.0, 1.0}
    assert (drawn.down == np.where(drawn.rtt == 10, 5.0, 2.0)).all()
    shares = [float((drawn.up == rate).mean()) for rate in link.up_mbps]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)


def test_profile_becomes_samples_with_its_median_and_jitter() -> None:
    link = LinkProfile(
        name="x", description="", rtt_ms=60, up_mbps=8, down_mbps=25, loss=0.005, jitter_ms=20
    )
    state = LinkState.from_profile(link, http_ms=1.0)
    assert np.median(state.rtt_ms) == pytest.approx(60, rel=0.05)
    assert np.std(state.rtt_ms) == pytest.approx(20, rel=0.15)
    assert min(state.rtt_ms) > 0
    assert (state.up_mbps, state.down_mbps, state.loss) == ((8,), (25,), 0.005)
    assert LinkState.from_profile(link, http_ms=1.0) == state


@pytest.mark.parametrize("name", ["lan", "wifi", "lte", "satellite"])
def test_built_in_links(name: str) -> None:
    assert exchange_ms(LinkState.from_profile(load_link(name)), 10_000, 1000) > 0


def test_moments_need_a_sample_each() -> None:
    with pytest.raises(ValueError, match="up_mbps needs one sample for each of 3 moments"):
        LinkState(name="x", rtt_ms=(1.0,), up_mbps=(1.0, 2.0), down_mbps=(1.0,), moments=3)


@pytest.mark.parametrize(
    ("field", "values"), [("rtt_ms", ()), ("rtt_ms", (-1.0,)), ("up_mbps", (0.0,))]
)
def test_states_without_samples_are_refused(field: str, values: tuple[float, ...]) -> None:
    fields: dict[str, Any] = {"rtt_ms": (1.0,), "up_mbps": (1.0,), "down_mbps": (1.0,)}
    with pytest.raises(ValueError, match=field):
        LinkState(name="x", **{**fields, field: values})
