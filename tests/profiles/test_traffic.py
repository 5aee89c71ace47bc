import dataclasses
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.link import load_link
from edgeclip.profiles.schema import parse
from edgeclip.profiles.traffic import Traffic, load_traffic, traffic_names

positive = st.floats(min_value=1e-6, max_value=1e9)
traffics = st.builds(
    Traffic,
    name=st.text(min_size=1).filter(str.strip),
    description=st.text(),
    requests_per_second=positive,
    arrivals=st.sampled_from(["poisson", "even"]),
    seconds=positive,
    link=st.just("lan"),
    deadline_ms=positive,
    p99_ms=positive,
    answered=st.floats(0, 1),
)


@given(traffics)
def test_yaml_round_trip_gives_equal_traffic(traffic: Traffic) -> None:
    data = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(traffic)))
    assert parse(Traffic, data, source="test") == traffic


@pytest.mark.parametrize("name", traffic_names())
def test_all_built_in_traffic_loads_and_names_a_link(name: str) -> None:
    traffic = load_traffic(name)
    assert traffic.name == name
    assert load_link(traffic.link).name == traffic.link


def test_the_default_service_level() -> None:
    traffic = load_traffic("steady")
    assert traffic.requests_per_second * 86_400 >= 25_000_000
    assert (traffic.p99_ms, traffic.answered, traffic.seconds) == (200, 0.999, 600)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "name must not be empty"),
        ({"link": ""}, "link must not be empty"),
        ({"requests_per_second": 0.0}, "requests_per_second must be above 0"),
        ({"answered": 1.5}, "answered is a share"),
        ({"answered": -0.1, "p99_ms": 0.0}, "p99_ms must be .*; answered must be"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load_traffic("steady"), **changes)


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no traffic is named 'stedy' \(did you mean 'steady'"):
        load_traffic("stedy")
