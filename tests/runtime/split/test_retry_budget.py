import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.resilience import RetryBudget


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 1), st.floats(0, 20))
def test_extra_attempts_never_exceed_the_share_and_what_was_saved(
    calls: list[bool], share: float, most: float
) -> None:
    budget = RetryBudget(share, most)
    extra = 0
    for fails in calls:
        budget.deposit()
        extra += fails and budget.withdraw()
    assert extra <= share * len(calls) + most + 1e-6


def test_long_outage_leaves_one_retry_in_ten_calls() -> None:
    budget = RetryBudget(0.1, 5)
    allowed = []
    for _ in range(200):
        budget.deposit()
        allowed.append(budget.withdraw())
    assert all(allowed[:5])
    assert sum(allowed[100:]) == 10


def test_nothing_below_zero() -> None:
    with pytest.raises(InputError):
        RetryBudget(-0.1)
