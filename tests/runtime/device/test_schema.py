import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from annotated_types import Ge
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.device.schema import parse, read_yaml
from edgeclip.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    kind: Literal["wheel", "door"]
    sizes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Car:
    name: str
    seats: Annotated[int, Ge(1)]
    electric: bool
    parts: tuple[Part, ...] = ()
    owner: str | None = None
    pair: tuple[str, int] = ("x", 0)

    def __post_init__(self) -> None:
        if self.name == self.owner:
            raise ValueError("a car cannot own itself")


GOOD = {"name": "bus", "seats": 40, "electric": True}
names = st.text(max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
parts = st.builds(Part, st.sampled_from(["wheel", "door"]), st.lists(floats, max_size=4).map(tuple))
cars = st.builds(
    Car,
    name=names.map(lambda name: name + "!"),
    seats=st.integers(1, 2**60),
    electric=st.booleans(),
    parts=st.lists(parts, max_size=3).map(tuple),
    owner=st.none() | names.filter(lambda name: not name.endswith("!")),
    pair=st.tuples(names, st.integers(-(2**60), 2**60)),
)


@given(cars)
def test_json_round_trip_gives_an_equal_object(car: Car) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(car)))
    assert parse(Car, data, source="test") == car


@given(cars)
def test_yaml_round_trip_gives_an_equal_object(car: Car) -> None:
    data = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(car)))))
    assert parse(Car, data, source="test") == car


@given(st.text(min_size=1).filter(lambda key: key not in Car.__slots__), st.integers())
def test_every_unknown_key_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parse(Car, GOOD | {key: value}, source="test")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3),
        ("name", None),
        ("seats", "4"),
        ("seats", 4.0),
        ("seats", True),
        ("seats", 0),
        ("electric", 1),
        ("electric", "yes"),
        ("parts", {}),
        ("parts", [{"kind": "roof"}]),
        ("parts", [{"kind": "door", "sizes": ["1"]}]),
        ("parts", [{"kind": "door", "colour": "red"}]),
        ("pair", ["a"]),
        ("pair", ["a", 1, 2]),
    ],
)
def test_wrong_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^  {key}"):
        parse(Car, GOOD | {key: value}, source="test")


def test_all_mistakes_are_in_one_message() -> None:
    data = {"seats": -1, "electric": "no", "parts": [{"kind": "roof", "x": 1}], "colour": 3}
    with pytest.raises(ConfigError) as caught:
        parse(Car, data, source="car.yaml")
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  colour: unknown key",
        "  electric: input should be a valid boolean, got 'no'",
        "  name: field required",
        "  parts.0.kind: input should be 'wheel' or 'door', got 'roof'",
        "  parts.0.x: unknown key",
        "  seats: must be at least 1, got -1",
    ]
    assert str(caught.value).startswith("car.yaml is not valid:\n")


def test_rules_between_fields_are_reported() -> None:
    with pytest.raises(ConfigError, match="a car cannot own itself"):
        parse(Car, GOOD | {"owner": "bus"}, source="test")


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_anything_but_a_mapping_is_refused(data: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        parse(Car, data, source="test")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_data_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="not plain data"):
        parse(Car, GOOD | {"seats": value}, source="test")


def test_yaml_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "car.yaml"
    path.write_text("name: bus\nseats: 3 # three\nelectric: true\npair: [a, 1]\n")
    assert read_yaml(Car, path) == Car(name="bus", seats=3, electric=True, pair=("a", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "is not YAML"),
        (b"name: \xff\xfe", "is not YAML"),
        (b"seats: 1\nname: a\nseats: 2\n", "the key 'seats' occurs twice"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"? [a, b]\n: 1\n", "is not YAML"),
        (b"name: 2020-99-99", "is not YAML"),
        (b"name: 2020-01-01", "is not plain data"),
        (b"a: &a {b: *a}", "is not plain data"),
        (b"", "expected a mapping"),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "car.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(Car, path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            read_yaml(Car, path)
