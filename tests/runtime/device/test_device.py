import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeclip.runtime.device.device_profile import (
    DeviceProfile,
    device_from_machine,
    device_names,
    load_device,
)
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError

JETSON = load_device("jetson-orin-nano")


def test_the_built_in_devices_are_these() -> None:
    assert device_names() == (
        "this-machine",
        "arm64-dotprod",
        "h200",
        "jetson-agx-orin",
        "jetson-orin-nano",
        "jetson-orin-nano-jetpack7",
        "jetson-thor",
        "jetson-thor-tensorrt11",
        "rtx-4000-ada",
        "rtx-a2000",
        "rtx-blackwell",
        "web",
        "x86-avx2",
        "x86-avx512-vnni",
    )


@pytest.mark.parametrize("name", device_names())
def test_every_built_in_device_loads_under_its_name(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert parse(DeviceProfile, json.loads(json.dumps(dataclasses.asdict(device))), source="x") == (
        device
    )


@pytest.mark.parametrize(
    ("name", "engine", "capability", "tensorrt_major"),
    [
        ("jetson-orin-nano", "tensorrt", "8.7", 10),
        ("rtx-4000-ada", "tensorrt-rtx", "8.9", None),
        ("rtx-blackwell", "tensorrt-rtx", "12.0", None),
        ("h200", "tensorrt", "9.0", 11),
        ("x86-avx2", "onnxruntime-cpu", None, None),
    ],
)
def test_facts_of_the_devices(
    name: str, engine: str, capability: str | None, tensorrt_major: int | None
) -> None:
    device = load_device(name)
    assert (device.engine, device.compute_capability) == (engine, capability)
    assert device.tensorrt_major == tensorrt_major


def test_this_machine_can_run_something() -> None:
    device = load_device("this-machine")
    assert device.engine == "onnxruntime-cpu"
    assert device.threads >= 1
    assert device.memory_mb is None or device.memory_mb > 100
    assert "fp32" in device.precisions


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [
        (("avx2", "fma"), False),
        (("avx2", "avx512f"), False),
        (("avx2", "avx_vnni"), True),
        (("avx512f", "avx512_vnni"), True),
        (("asimd",), False),
        (("asimd", "asimddp"), True),
    ],
)
def test_int8_dot_products_are_seen_in_the_flags(flags: tuple[str, ...], vnni: bool) -> None:
    machine = Machine(cpu="x", cores=3, flags=flags, memory_mb=None, os="", python="", packages=())
    device = device_from_machine(machine)
    assert device.vnni is vnni
    assert device.threads == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "name must not be empty"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"memory_mb": -1}, "memory_mb must be at least 1"),
        ({"latency_budget_ms": 0.0}, "latency_budget_ms must be above 0"),
        ({"size_budget_mb": float("nan")}, "size_budget_mb must be above 0"),
        ({"precisions": ()}, "at least one precision"),
        ({"precisions": ("fp32", "fp32")}, "must not repeat"),
        ({"batch_best": 0}, "batch_best must be at least 1"),
        ({"batch_min": 4}, "batch_min must not be above batch_best"),
        ({"batch_best": 64}, "nor batch_best above batch_max"),
        ({"batch_min": 2, "batch_best": 8}, "batch_min must be 1, or equal batch_max"),
        ({"precisions": ("fp8",)}, "fp8 needs TensorRT and compute_capability 8.9"),
        ({"cpu_fallback": True}, "cpu_fallback is for ONNX Runtime's engines only"),
        ({"vnni": True}, "vnni is for engines on the CPU only"),
        ({"compute_capability": None}, "needs compute_capability"),
        ({"compute_capability": "87"}, "must look like '8.7'"),
        ({"compute_capability": "0.7"}, "must look like '8.7'"),
        ({"compute_capability": "8.7\n"}, "must look like '8.7'"),
        ({"tensorrt_major": None}, "needs tensorrt_major"),
        ({"tensorrt_major": 0}, "tensorrt_major must be at least 1"),
        ({"engine": "tensorrt-rtx"}, "tensorrt-rtx supports .* not 8.7"),
        ({"engine": "onnxruntime-cuda"}, "has no int8 MatMul"),
        (
            {"engine": "tensorrt-rtx", "hardware_portability": "ampere-plus"},
            "drop hardware_portability and version_portability",
        ),
        ({"engine": "onnxruntime-tensorrt-rtx"}, "tensorrt-rtx supports .* not 8.7"),
        ({"engine": "onnxruntime-tensorrt", "tensorrt_major": None}, "needs tensorrt_major"),
        (
            {"engine": "onnxruntime-cuda", "version_portability": True},
            "version_portability is for the TensorRT engines only",
        ),
        ({"engine": "onnxruntime-cuda"}, "tensorrt_major is for the TensorRT engines only"),
        ({"engine": "onnxruntime-cpu"}, "compute_capability is for GPU engines only"),
        ({"engine": "onnxruntime-cpu"}, "shared_memory is for GPU engines only"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(JETSON, **changes)


def test_a_cuda_device_in_half_precision_is_fine() -> None:
    device = dataclasses.replace(
        JETSON, engine="onnxruntime-cuda", precisions=("fp16",), tensorrt_major=None
    )
    assert device.precisions == ("fp16",)


def test_a_batch_that_may_not_vary_is_static() -> None:
    assert JETSON.static_batch is None
    assert dataclasses.replace(JETSON, batch_min=8, batch_best=8, batch_max=8).static_batch == 8


def test_fp8_is_for_ada_and_later() -> None:
    ada = load_device("rtx-4000-ada")
    assert "fp8" in ada.precisions
    with pytest.raises(ValueError, match="fp8 needs TensorRT"):
        dataclasses.replace(ada, compute_capability="8.6")


def test_all_mistakes_of_a_file_are_in_one_message(tmp_path: Path) -> None:
    data = dataclasses.asdict(JETSON) | {
        "engine": "tensorflow",
        "precisions": ["int4"],
        "threads": -2,
        "compute_capability": 8.7,
        "cores": 6,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    with pytest.raises(ConfigError) as caught:
        load_device(path)
    for part in ("engine", "precisions.0", "threads", "compute_capability", "cores: unknown key"):
        assert f"\n  {part}" in str(caught.value)


def test_a_file_is_loaded_by_text_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    data = json.loads(json.dumps(dataclasses.asdict(JETSON) | {"name": "mine", "threads": 2}))
    path.write_text(yaml.safe_dump(data))
    assert load_device(path) == load_device(str(path))
    assert load_device(path) == dataclasses.replace(JETSON, name="mine", threads=2)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_device("jetson-orin-nan")
    assert "did you mean 'jetson-orin-nano'" in str(caught.value)
    for name in device_names():
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["", "../devices/h200", "H200", "h200.yml"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(ConfigError):
        load_device(name)
