import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.device.schema import Range, check_ranges


@dataclass(frozen=True, slots=True)
class Point:
    share: Annotated[float, Range(at_least=0, below=1)]
    width: Annotated[float | None, Range(above=0)] = None
    free: float = math.nan

    def __post_init__(self) -> None:
        check_ranges(self)


@given(st.floats())
def test_a_share_is_accepted_exactly_inside_its_bounds(value: float) -> None:
    bounds = Range(at_least=0, below=1)
    if 0 <= value < 1:
        assert bounds.check(value) == value
    else:
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            bounds.check(value)


def test_above_excludes_its_bound_and_none_passes() -> None:
    assert Range(above=0).check(None) is None
    assert Range(above=0).check(5e-324) == 5e-324
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        Range(above=0).check(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_range_without_bounds_wants_a_finite_number(value: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        Range().check(value)


def test_objects_made_in_python_are_checked_too() -> None:
    assert Point(0.5).width is None
    with pytest.raises(ValueError, match=r"^share must .* got 1; width must be above 0, got -2$"):
        Point(1, -2)
