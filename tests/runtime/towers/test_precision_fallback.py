"""Choice of a precision, and the fallback where an engine is wrong."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import TowerManifest
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines import engine_cache
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.errors import BundleError, EngineError, EngineParityError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import (
    TowerRunner,
    choose_precision,
    open_with_fallback,
    usable_precisions,
)

Log = pytest.LogCaptureFixture


class Opener:
    """Loads towers for real, but finds the engines of some precisions wrong."""

    def __init__(self, *wrong: Precision) -> None:
        self.wrong = wrong
        self.asked: list[tuple[Precision, str]] = []

    def __call__(
        self, bundle: Bundle, tower: Tower, precision: Precision, device: DeviceProfile
    ) -> TowerRunner:
        self.asked.append((precision, device.name))
        if precision in self.wrong and not device.name.endswith("-cpu-cpu"):
            raise EngineParityError(f"the engine of {tower} {precision} is wrong")
        return TowerRunner(bundle, tower, precision, device)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_what_is_right_is_taken(bundle: Bundle, cpu_device: DeviceProfile, caplog: Log) -> None:
    opener = Opener("fp32")
    runner = open_with_fallback(bundle, "image", "int8", cpu_device, open_runner=opener)
    assert (runner.precision, opener.asked) == ("int8", [("int8", "test-cpu")])
    assert caplog.messages == []


def test_the_next_more_exact_precision_takes_its_place(
    bundle: Bundle, cpu_device: DeviceProfile, caplog: Log
) -> None:
    opener = Opener("int8")
    runner = open_with_fallback(bundle, "image", "int8", cpu_device, open_runner=opener)
    assert (runner.precision, runner.device) == ("fp32", cpu_device)
    assert caplog.messages == ["the engine of image int8 is wrong; using fp32 for the image tower"]


def test_at_last_the_cpu(bundle: Bundle, cpu_device: DeviceProfile, caplog: Log) -> None:
    device = replace(cpu_device, name="jetson-cpu", engine="onnxruntime-openvino")
    opener = Opener("int8", "fp32")
    runner = open_with_fallback(bundle, "image", "int8", device, open_runner=opener)
    assert runner.device == device.cpu_profile()
    assert [name for _, name in opener.asked] == ["jetson-cpu", "jetson-cpu", "jetson-cpu-cpu"]
    assert "ONNX Runtime on the CPU, which is slow" in caplog.text


def test_where_nothing_is_right_the_error_stays(bundle: Bundle, cpu_device: DeviceProfile) -> None:
    with pytest.raises(EngineParityError, match="image fp32 is wrong"):
        open_with_fallback(
            bundle, "image", "int8", cpu_device, open_runner=Opener("int8", "fp16", "fp32")
        )


def test_other_failures_are_for_a_person_to_mend(bundle: Bundle, cpu_device: DeviceProfile) -> None:
    def no_gpu(*_: object) -> TowerRunner:
        raise EngineError("no GPU")

    with pytest.raises(EngineError, match="no GPU"):
        open_with_fallback(bundle, "image", "int8", cpu_device, open_runner=no_gpu)


@pytest.fixture
def wrong_engines(monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
    """A device with TensorRT all of whose engines miss their gate."""
    pytest.importorskip("tensorrt_rtx")

    def find(*_: object, **__: object) -> Engine:
        raise EngineParityError("the engine is wrong")

    monkeypatch.setattr(engine_cache, "find_or_build", find)
    return load_device("rtx-4000-ada")


def test_an_encoder_falls_back_and_says_what_runs(
    tiny_bundle: Path, cpu_device: DeviceProfile, wrong_engines: DeviceProfile, caplog: Log
) -> None:
    encoder = Encoder.open(tiny_bundle, device=wrong_engines)
    image = Image.new("RGB", (12, 12), "red")
    found = encoder.encode_image(image)
    assert encoder.precisions["image"] == "fp32"
    assert "using fp32" in caplog.text
    expected = Encoder.open(tiny_bundle, device=cpu_device, precision="fp32").encode_image(image)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_precision_that_was_asked_for_is_not_replaced(
    tiny_bundle: Path, wrong_engines: DeviceProfile
) -> None:
    encoder = Encoder.open(tiny_bundle, device=wrong_engines, precision="int8")
    with pytest.raises(EngineParityError):
        encoder.encode_text("red")


@pytest.fixture
def image_tower(tiny_bundle: Path) -> TowerManifest:
    """In fp32 and int8, int8 chosen."""
    return Bundle.open(tiny_bundle).manifest.tower("image")


def test_the_bundles_choice_is_the_default(
    image_tower: TowerManifest, cpu_device: DeviceProfile
) -> None:
    assert choose_precision(image_tower, cpu_device) == "int8"


def test_a_wish_wins(image_tower: TowerManifest, cpu_device: DeviceProfile) -> None:
    assert choose_precision(image_tower, cpu_device, "fp32") == "fp32"


def test_device_without_the_chosen_precision_gets_its_own_first(
    image_tower: TowerManifest, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16", "fp32"))
    assert choose_precision(image_tower, device) == "fp32"


def test_wish_that_the_device_forbids(
    image_tower: TowerManifest, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16", "fp32"))
    with pytest.raises(InputError, match="does not allow int8: choose fp16 or fp32"):
        choose_precision(image_tower, device, "int8")


def test_wish_that_the_bundle_lacks(image_tower: TowerManifest, cpu_device: DeviceProfile) -> None:
    with pytest.raises(BundleError, match="has no fp16 image tower"):
        choose_precision(image_tower, cpu_device, "fp16")


def test_nothing_fits(image_tower: TowerManifest, cpu_device: DeviceProfile) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16",))
    with pytest.raises(BundleError, match="in fp32, int8, but device 'test-cpu' allows fp16"):
        choose_precision(image_tower, device)


@pytest.fixture
def for_vnni(image_tower: TowerManifest) -> TowerManifest:
    """The same tower, its int8 made for CPUs with int8 dot products."""
    files = tuple(
        dataclasses.replace(file, needs_vnni=file.precision == "int8") for file in image_tower.files
    )
    return dataclasses.replace(image_tower, files=files)


def test_int8_for_vnni_is_not_run_without(
    for_vnni: TowerManifest, cpu_device: DeviceProfile
) -> None:
    with_vnni = dataclasses.replace(cpu_device, vnni=True)
    assert choose_precision(for_vnni, with_vnni) == "int8"
    assert choose_precision(for_vnni, with_vnni, "int8") == "int8"
    assert not cpu_device.vnni
    assert choose_precision(for_vnni, cpu_device) == "fp32"
    assert usable_precisions(for_vnni, cpu_device) == ("fp32",)
    with pytest.raises(InputError, match="made for CPUs with VNNI, which device 'test-cpu' lacks"):
        choose_precision(for_vnni, cpu_device, "int8")
