from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines import engine_cache
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.errors import EngineError, EngineParityError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.fallback import open_with_fallback
from edgeclip.runtime.towers.tower_runner import TowerRunner

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
