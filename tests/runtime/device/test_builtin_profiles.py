import dataclasses
from pathlib import Path

import pytest
import yaml

from edgeclip.runtime.device.link import LinkProfile, load_link
from edgeclip.runtime.device.schema import builtin_names, load_profile
from edgeclip.runtime.errors import ConfigError


def test_names_are_those_of_the_files() -> None:
    folder = Path(__file__).parents[3] / "profiles" / "links"
    assert builtin_names("links") == tuple(sorted(path.stem for path in folder.iterdir()))


def test_a_file_in_the_working_directory_needs_its_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = dataclasses.replace(load_link("lan"), name="mine")
    Path("wifi.yaml").write_text(yaml.safe_dump(dataclasses.asdict(mine)))
    assert load_profile(LinkProfile, "links", "wifi").name == "wifi"
    assert load_profile(LinkProfile, "links", "wifi.yaml").name == "mine"
    assert load_profile(LinkProfile, "links", Path("wifi.yaml")).name == "mine"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read no/such\.yaml"):
        load_profile(LinkProfile, "links", "no/such.yaml")


def test_names_that_the_caller_adds_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"no link is named 'x'; known names: moon, lan"):
        load_profile(LinkProfile, "links", "x", ("moon",))
