import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.device.link import LinkProfile, link_names, load_link
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError

positive = st.floats(min_value=1e-6, max_value=1e9)
links = st.builds(
    LinkProfile,
    name=st.text(min_size=1).filter(str.strip),
    description=st.text(),
    rtt_ms=st.floats(0, 1e6),
    up_mbps=positive,
    down_mbps=positive,
    loss=st.floats(0, 1, exclude_max=True),
    jitter_ms=st.floats(0, 1e6),
)


@given(links)
def test_yaml_round_trip_gives_an_equal_link(link: LinkProfile) -> None:
    data = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(link)))
    assert parse(LinkProfile, data, source="test") == link


def test_the_built_in_links_are_these() -> None:
    assert link_names() == ("lan", "lte", "satellite", "wifi")


@pytest.mark.parametrize("name", link_names())
def test_every_built_in_link_loads_and_says_it_is_typical(name: str) -> None:
    assert load_link(name).name == name
    path = Path(__file__).parents[3] / "profiles" / "links" / f"{name}.yaml"
    assert path.read_text().startswith("# Typical values, not measurements")


def test_links_are_ordered_as_a_person_expects() -> None:
    lan, wifi, lte = (load_link(name) for name in ("lan", "wifi", "lte"))
    assert lan.rtt_ms < wifi.rtt_ms < lte.rtt_ms
    assert lan.up_mbps > wifi.up_mbps > lte.up_mbps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"rtt_ms": -1.0}, "rtt_ms must be at least 0"),
        ({"up_mbps": 0.0}, "up_mbps must be above 0"),
        ({"down_mbps": float("inf")}, "down_mbps must be above 0"),
        ({"loss": 1.0}, "loss must be at least 0 and below 1"),
        ({"loss": -0.1, "jitter_ms": -1.0}, "loss must be .*; jitter_ms must be"),
    ],
)
def test_values_out_of_bounds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load_link("lan"), **changes)


def test_all_mistakes_of_a_file_are_in_one_message(tmp_path: Path) -> None:
    data = dataclasses.asdict(load_link("lan")) | {"loss": 2, "rtt_ms": "fast", "speed": 1}
    (tmp_path / "mine.yaml").write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        load_link(tmp_path / "mine.yaml")
    for part in ("loss: must be", "rtt_ms: input should be a valid number", "speed: unknown key"):
        assert part in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'wifi'.*lan, lte, satellite, wifi"):
        load_link("wi-fi")
