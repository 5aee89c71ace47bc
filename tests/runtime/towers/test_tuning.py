"""What `edgeclip tune` keeps, and when a bundle runs by it."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.towers.tuning import (
    TunedTower,
    Tuning,
    find_tuning,
    machine_state,
    tuning_path,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tuned(cpu_device: DeviceProfile) -> TunedTower:
    device = dataclasses.replace(cpu_device, name="this-machine", threads=1)
    return TunedTower(tower="text", precision="int8", device=device, batch=1, ms_per_row=0.1)


def keep(bundle: Path, tuned: TunedTower, **changes: object) -> Path:
    opened = Bundle.open(bundle)
    found = Tuning(
        bundle=opened.sha256, machine=machine_state(), towers=(tuned,), command="edgeclip tune"
    )
    path = tuning_path(opened)
    path.parent.mkdir(parents=True)
    dataclasses.replace(found, **changes).save(path)  # type: ignore[arg-type]
    return path


def test_a_bundle_opens_as_it_was_tuned(
    tiny_bundle: Path, tuned: TunedTower, caplog: pytest.LogCaptureFixture
) -> None:
    before = Encoder.open(tiny_bundle)
    keep(tiny_bundle, tuned)
    with caplog.at_level(logging.INFO):
        encoder = Encoder.open(tiny_bundle)
    assert "tuned text tower: onnxruntime-cpu int8, 1 thread" in caplog.text
    assert encoder.precisions == {**before.precisions, "text": "int8"}
    assert encoder.devices["text"] == tuned.device
    assert encoder.devices["image"] == encoder.device
    expected = Encoder.open(tiny_bundle, precision="int8").encode_text(["a red apple"])
    np.testing.assert_array_equal(encoder.encode_text(["a red apple"]), expected)


def test_what_is_asked_for_comes_first(
    tiny_bundle: Path, tuned: TunedTower, cpu_device: DeviceProfile
) -> None:
    keep(tiny_bundle, tuned)
    assert Encoder.open(tiny_bundle, device=cpu_device).precisions["text"] == "fp32"
    assert Encoder.open(tiny_bundle, device="this-machine").precisions["text"] == "fp32"
    assert Encoder.open(tiny_bundle, precision="fp32").precisions["text"] == "fp32"


def test_none_was_tuned(tiny_bundle: Path) -> None:
    assert find_tuning(Bundle.open(tiny_bundle)) is None


def test_another_machine_or_another_version_is_told(
    tiny_bundle: Path, tuned: TunedTower, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tiny_bundle, tuned, machine="0" * 64)
    assert Encoder.open(tiny_bundle).precisions["text"] == "fp32"
    (record,) = caplog.records
    assert "made on another processor or with other versions" in record.getMessage()


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 1}', "\x00"])
def test_a_damaged_file_is_told_and_not_used(
    tiny_bundle: Path, tuned: TunedTower, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tiny_bundle, tuned).write_text(text)
    assert Encoder.open(tiny_bundle).precisions["text"] == "fp32"
    (record,) = caplog.records
    assert "; run `edgeclip tune " in record.getMessage()


def test_a_changed_bundle_is_another(own_bundle: Path, tuned: TunedTower) -> None:
    keep(own_bundle, tuned)
    assert find_tuning(Bundle.open(own_bundle)) is not None
    manifest = own_bundle / "edgeclip.json"
    manifest.write_text(manifest.read_text().replace('"name": "tiny"', '"name": "other"'))
    assert find_tuning(Bundle.open(own_bundle)) is None


def test_new_choices_take_the_place_of_the_same_towers(tuned: TunedTower) -> None:
    image = dataclasses.replace(tuned, tower="image", precision="fp32")
    first = Tuning(bundle="a", machine="b", towers=(tuned, image), command="one")
    faster = dataclasses.replace(tuned, ms_per_row=0.05)
    second = first.with_towers((faster,), command="two")
    assert (second.of("text"), second.of("image"), second.command) == (faster, image, "two")
    assert Tuning.from_json(second.to_json(), source="x") == second
    text = second.to_json().replace('"tower": "image"', '"tower": "text"')
    with pytest.raises(ConfigError, match="towers must not repeat one"):
        Tuning.from_json(text, source="x")
