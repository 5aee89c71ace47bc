"""Bounds of the fields of dataclasses that are made in Python."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, IsFinite, Lt
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.device.schema import check_bounds


@dataclass(frozen=True, slots=True)
class Shape:
    share: Annotated[float, Ge(0), Lt(1)]
    width: Annotated[float | None, Gt(0)] = None
    offset: IsFinite[float] = 0.0
    free: float = math.nan

    def __post_init__(self) -> None:
        check_bounds(self)


@given(st.floats())
def test_a_value_is_accepted_exactly_inside_its_bounds(value: float) -> None:
    if 0 <= value < 1:
        assert Shape(value).share == value
    else:
        with pytest.raises(ValueError, match="share must be at least 0 and below 1, got"):
            Shape(value)


def test_above_excludes_its_bound_and_none_passes() -> None:
    assert Shape(0.5).width is None
    assert Shape(0.5, 5e-324).width == 5e-324
    with pytest.raises(ValueError, match="width must be above 0, got 0"):
        Shape(0.5, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_pass_no_bound(value: float) -> None:
    with pytest.raises(ValueError, match="offset must be a finite number"):
        Shape(0.5, offset=value)
    with pytest.raises(ValueError, match="width must be above 0"):
        Shape(0.5, value)


def test_all_fields_out_of_bounds_are_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"^share must .* got 1; width must be above 0, got -2$"):
        Shape(1, -2)
