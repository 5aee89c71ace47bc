"""Records kept as JSON: what goes in comes out, and damage is one clear error."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather(JsonRecord):
    SCHEMA_VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "weather"
    HINT: ClassVar[str] = "look out of the window"

    place: str
    degrees: tuple[float, ...] = ()


MADE = Weather(place="Zürich", degrees=(1.5, -2.0))
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(place=st.text(), degrees=st.lists(finite).map(tuple))
def test_a_round_trip_gives_an_equal_record(place: str, degrees: tuple[float, ...]) -> None:
    made = Weather(place=place, degrees=degrees)
    assert Weather.from_json(made.to_json(), source="x") == made


def test_a_file_says_its_schema_first(tmp_path: Path) -> None:
    path = tmp_path / "weather.json"
    MADE.save(path)
    assert next(iter(json.loads(path.read_text(encoding="utf-8")))) == "schema_version"
    assert Weather.load(path) == MADE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "schema None of weather is not 3: look out of the window"),
        ('{"schema_version": 2, "place": "x"}', "schema 2 of weather is not 3"),
        ('{"schema_version": true, "place": "x"}', "schema True of weather"),
        ('{"schema_version": 3, "place": 5}', "place: "),
        ('{"schema_version": 3, "place": "x", "wind": 1}', "wind: unknown key"),
    ],
)
def test_damage_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Weather.from_json(text, source="here")


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Weather(place="x", degrees=(float("nan"),)).to_json()


def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Weather.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        Weather.load(tmp_path / "binary.json")
