import contextlib
from pathlib import Path

import pytest
import yaml

from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.engines.tensorrt_library import gpu_name
from edgeclip.runtime.errors import EngineError

_PRECISIONS = ("fp32", "int8")  # of the bundle, in the order of the device

Capture = pytest.CaptureFixture[str]


def build(*arguments: object) -> int:
    return main(["build", *map(str, arguments)])


@pytest.fixture
def openvino_device(tmp_path: Path) -> Path:
    path = tmp_path / "intel.yaml"
    device = {
        "name": "intel",
        "description": "an Intel CPU",
        "engine": "onnxruntime-openvino",
        "precisions": ["fp32", "int8"],
        "threads": 1,
        "memory_mb": None,
    }
    path.write_text(yaml.safe_dump(device))
    return path


def test_a_cpu_needs_no_engines(tiny_bundle: Path, capsys: Capture) -> None:
    assert build(tiny_bundle, "--device", "this-machine") == 2
    assert "use the bundle as it is" in capsys.readouterr().err


def test_a_provider_that_compiles_needs_a_folder(
    tiny_bundle: Path, openvino_device: Path, capsys: Capture
) -> None:
    assert build(tiny_bundle, "--device", openvino_device) == 2
    assert "name a folder with --out" in capsys.readouterr().err


def test_contexts_are_written_where_the_provider_is(
    tiny_bundle: Path, openvino_device: Path, tmp_path: Path, capsys: Capture
) -> None:
    import onnxruntime

    out = tmp_path / "contexts"
    status = build(tiny_bundle, "--device", openvino_device, "--precision", "fp32", "--out", out)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        assert status == 0
        assert {path.suffix for path in out.iterdir()} == {".onnx"}
    else:
        assert status == 1
        assert all("install onnxruntime-openvino" in line for line in lines)
        assert not out.exists() or list(out.iterdir()) == []


def test_a_machine_without_the_gpu_says_so_of_every_tower(
    tiny_bundle: Path, capsys: Capture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    with contextlib.suppress(EngineError):
        pytest.skip(f"this machine has {gpu_name()}")
    assert build(tiny_bundle, "--device", "rtx-4000-ada") == 1
    lines = capsys.readouterr().out.splitlines()
    towers = [f"{tower} {precision}" for tower in ("image", "text") for precision in _PRECISIONS]
    assert [line.split(":")[0] for line in lines] == towers
    assert all("NVIDIA driver" in line for line in lines)


def test_precisions_that_the_device_lacks(tiny_bundle: Path, capsys: Capture) -> None:
    device = load_device("rtx-4000-ada")
    assert "fp16" in device.precisions  # the bundle has none
    assert build(tiny_bundle, "--device", device.name, "--precision", "fp16") == 2
    assert "choose from" in capsys.readouterr().err
