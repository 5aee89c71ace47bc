"""Bounds of numbers, written once in a field's type and checked wherever it is made."""

import math
import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bounds of a number: `Annotated[int, Range(at_least=1)]`. `None` always passes.

    `schema.parse` reports a value out of bounds together with every other mistake;
    `check_ranges` does the same for an object made in Python.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def check(self, value: float | None) -> float | None:
        """Return `value` as it is.

        Raises:
            ValueError: it is out of bounds, infinite or not a number.
        """
        inside = value is None or (
            math.isfinite(value) and self.at_least <= value and self.above < value < self.below
        )
        if not inside:
            raise ValueError(f"must be {self}, got {value}")
        return value

    def __str__(self) -> str:
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("below", self.below),
        )
        words = [f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)]
        return " and ".join(words) or "a finite number"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Let pydantic call `check` after it has checked the type."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


def check_ranges(made: object) -> None:
    """Check every field of a dataclass whose type carries a `Range`.

    Raises:
        ValueError: one message that names every field out of bounds.
    """
    mistakes = []
    for name, hint in typing.get_type_hints(type(made), include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            try:
                if isinstance(mark, Range):
                    mark.check(getattr(made, name))
            except ValueError as error:
                mistakes.append(f"{name} {error}")
    if mistakes:
        raise ValueError("; ".join(mistakes))
