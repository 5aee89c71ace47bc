import shlex
from pathlib import Path

import pytest

from edgeclip.profiles.predict import measured_device
from edgeclip.profiles.predict.measured_device import load_measured, measured_names
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.runtime.errors import ConfigError
from tests.profiles.predict.known_device import known_device

KEPT = Path(__file__).parents[3] / "profiles" / "measured"


def test_measured_devices_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_device, "_folder", lambda: tmp_path)
    known_device().save(tmp_path / "kitchen.json")
    assert measured_names() == ("kitchen",)
    assert load_measured("kitchen") == known_device()
    with pytest.raises(
        ConfigError,
        match=r"no measured device is named 'kitchn' \(did you mean 'kitchen'\?\); known names: "
        "kitchen; or give the path of a file that `edgeclip measure-probes` wrote",
    ):
        load_measured("kitchn")
    with pytest.raises(ConfigError, match="cannot read"):
        load_measured(tmp_path / "none.json")


def test_some_come_with_the_package() -> None:
    names = tuple(sorted(path.stem for path in KEPT.iterdir()))
    assert names == measured_names() != ()


@pytest.mark.parametrize("name", measured_names())
def test_one_that_comes_with_the_package_can_be_believed(name: str) -> None:
    found = load_measured(name)
    assert found.name == name
    assert found.carried is None
    assert found.interference is not None
    assert not found.interference.disturbed
    program, verb, *words = shlex.split(found.command)
    assert (program, verb) == ("edgeclip", "measure-probes")
    for word in words:
        path = word.rpartition("=")[2]
        assert not path.startswith(("/", "~")), "the path of one machine"
    assert {check.precision for check in found.checks} == set(found.precisions)
    predictor = Predictor(found)
    for check in found.checks:
        predicted = predictor.predict_blocks(check.parts, check.precision)
        assert 0 < predicted.low < predicted.ms < predicted.high
