import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.http_client import RecentTimes
from edgeclip.runtime.split.remote_with_fallback import DeviceTimes


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_a_duration_that_so_many_did_not_exceed(
    durations: list[float], share: float
) -> None:
    times = RecentTimes(keep=50)
    for seconds in durations:
        times.add(seconds)
    found = times.quantile(share)
    assert found in durations
    assert sum(seconds <= found for seconds in durations) >= share * len(durations)


def test_only_the_last_ones_count() -> None:
    times = RecentTimes(keep=3)
    assert times.quantile(0.5) is None
    for seconds in (100.0, 1.0, 2.0, 3.0):
        times.add(seconds)
    assert len(times) == 3
    assert times.quantile(1.0) == 3.0
    with pytest.raises(InputError):
        RecentTimes(keep=0)


def test_reserve_grows_with_work_and_count() -> None:
    time = DeviceTimes()
    nothing = time.reserve_s("pixels")
    with time.measured("pixels", 2):
        pass
    with time.measured("labels", 1):
        pass
    one, many = time.reserve_s("pixels"), time.reserve_s("pixels", count=100)
    assert 0 < nothing < one < many
    assert time.reserve_s("pixels", "labels") > one
