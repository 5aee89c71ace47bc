import math

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.resilience import Deadline


def test_time_runs_out_and_never_below_zero() -> None:
    now = [100.0]
    deadline = Deadline.after_ms(500, lambda: now[0])
    reserve = deadline.earlier(0.2)
    assert deadline.left() == pytest.approx(0.5)
    assert reserve.left() == pytest.approx(0.3)
    now[0] += 0.4
    assert (deadline.passed, reserve.passed) == (False, True)
    assert reserve.left() == 0
    now[0] += 10
    assert deadline.passed
    assert deadline.left() == 0


@pytest.mark.parametrize("milliseconds", [0, -1, math.nan, math.inf])
def test_deadline_must_lie_ahead(milliseconds: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        Deadline.after_ms(milliseconds)
