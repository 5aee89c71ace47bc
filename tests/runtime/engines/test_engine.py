import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.device.device_profile import DeviceProfile, EngineName, load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.engines.providers import PROVIDERS
from edgeclip.runtime.errors import EngineError


@pytest.fixture
def tower(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "vision_model.onnx"


def pixels(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def gpu_device(engine: EngineName, **changes: object) -> DeviceProfile:
    base = DeviceProfile(
        name="test-gpu",
        description="of this machine",
        engine="onnxruntime-cuda",
        precisions=("fp32",),
        threads=1,
        memory_mb=1000,
        compute_capability="8.6",
    )
    tensorrt_major = 10 if engine == "onnxruntime-tensorrt" else None
    given = {"engine": engine, "tensorrt_major": tensorrt_major, **changes}
    return dataclasses.replace(base, **given)  # type: ignore[arg-type]


def test_device_chooses_the_engine(tower: Path, cpu_device: DeviceProfile) -> None:
    engine = open_engine(tower, device=dataclasses.replace(cpu_device, threads=3))
    assert engine.name == "onnxruntime-cpu"
    options = engine._session.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 3


def test_content_is_loaded_in_place_of_the_file(
    tower: Path, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    content = tower.read_bytes()
    engine = open_engine(
        tmp_path / "absent.onnx", device=cpu_device, content=content, data_folder=tmp_path
    )
    assert set(engine.run({"pixel_values": pixels(2)})) == {"image_embeds"}


@pytest.mark.parametrize("name", ["jetson-orin-nano", "rtx-4000-ada"])
def test_tensorrt_runs_no_graphs(tower: Path, name: str) -> None:
    device = load_device(name)
    if not device.engine.startswith("tensorrt"):
        pytest.skip(f"{name} has engine {device.engine}")
    with pytest.raises(EngineError, match=rf"'{name}' runs TensorRT engines.*edgeclip build"):
        open_engine(tower, device=device)


ABSENT = [
    ("onnxruntime-cuda", r"edgeclip\[gpu\]"),
    ("onnxruntime-tensorrt", r"edgeclip\[gpu\] and the TensorRT 10 libraries"),
    ("onnxruntime-tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx"),
    ("onnxruntime-openvino", "onnxruntime-openvino"),
]


@pytest.mark.parametrize(("engine", "package"), ABSENT)
def test_absent_provider_says_what_to_install(
    tower: Path, cpu_device: DeviceProfile, engine: EngineName, package: str
) -> None:
    provider = PROVIDERS[engine]
    if provider.name in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider.name}")
    if provider.plugin is not None and importlib.util.find_spec(provider.plugin) is not None:
        pytest.skip(f"{provider.plugin} is installed")
    if engine == "onnxruntime-openvino":
        device = dataclasses.replace(cpu_device, engine=engine)
    else:
        device = gpu_device(engine)
    with pytest.raises(EngineError, match=rf"no {provider.name} .*: install {package}"):
        open_engine(tower, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [engine for engine, _ in ABSENT[:3]])
def test_gpu_gives_what_the_cpu_gives(
    tower: Path,
    cpu_device: DeviceProfile,
    engine: EngineName,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path))
    provider = PROVIDERS[engine]
    plugin = provider.plugin and importlib.util.find_spec(provider.plugin)
    if provider.name not in onnxruntime.get_available_providers() and not plugin:
        pytest.skip(f"this onnxruntime has no {provider.name}")
    found = open_engine(tower, device=gpu_device(engine), content=tower.read_bytes())
    expected = open_engine(tower, device=cpu_device)
    for count in (1, 3):
        feeds = {"pixel_values": pixels(count)}
        np.testing.assert_allclose(
            found.run(feeds)["image_embeds"], expected.run(feeds)["image_embeds"], atol=1e-3
        )
