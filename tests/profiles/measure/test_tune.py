"""Tuning the tiny bundle: all configurations are tried, right ones timed, one chosen."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgeclip.profiles.measure.tune import devices_here, tune_tower
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import GOLDEN_NAME
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import BundleError


@pytest.fixture
def openvino(cpu_device: DeviceProfile) -> DeviceProfile:
    pytest.importorskip("openvino", reason="pip install 'edgeclip[openvino]'")
    return dataclasses.replace(cpu_device, engine="openvino")


def test_the_fastest_of_all_ways_is_chosen(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    steps = list[tuple[int, int]]()
    bundle = Bundle.open(tiny_bundle)
    devices = [cpu_device, dataclasses.replace(cpu_device, threads=2)]
    found = tune_tower(bundle, "text", devices, progress=lambda *step: steps.append(step))
    assert {str(item.config) for item in found.timed} == {
        f"onnxruntime-cpu {precision}, {threads}"
        for precision in ("fp32", "int8")
        for threads in ("1 thread", "2 threads")
    }
    assert str(found.default) == "onnxruntime-cpu fp32, 1 thread"
    compared = [item for item in found.timed if item.compared]
    least = min(item.ms_per_row.value for item in compared)
    assert found.chosen in compared
    assert found.chosen.ms_per_row.value <= least / 0.98
    assert found.choice.precision == found.chosen.config.precision
    assert found.choice.device == found.chosen.config.device
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_throughput_also_tries_batches(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    found = tune_tower(Bundle.open(tiny_bundle), "image", [cpu_device], "throughput")
    assert {item.config.batch for item in found.timed} == {8, 16, 32}
    assert found.choice.device.batch_max == found.choice.batch == found.chosen.config.batch
    small = dataclasses.replace(cpu_device, batch_max=4)
    only = tune_tower(Bundle.open(tiny_bundle), "image", [small], "throughput")
    assert {item.config.batch for item in only.timed} == {4}


def test_another_engine_is_tried_and_named(
    tiny_bundle: Path, cpu_device: DeviceProfile, openvino: DeviceProfile
) -> None:
    found = tune_tower(Bundle.open(tiny_bundle), "image", [cpu_device, openvino])
    assert any(str(item.config).startswith("openvino fp32") for item in found.timed)


def test_what_gives_other_embeddings_is_left_out(
    own_bundle: Path, cpu_device: DeviceProfile, openvino: DeviceProfile
) -> None:
    golden = dict(np.load(own_bundle / GOLDEN_NAME))
    turned = {name: -value if "text" in name else value for name, value in golden.items()
              if value.dtype == np.float32}  # fmt: skip
    assert turned
    np.savez(own_bundle / GOLDEN_NAME, **(golden | turned))
    bundle = Bundle.open(own_bundle, check_hashes=False)
    found = tune_tower(bundle, "text", [cpu_device, openvino])
    assert all(item.config.device == cpu_device for item in found.timed)
    assert len(found.left_out) == 2
    assert all(
        "gives other embeddings than the bundle recorded" in why for _, why in found.left_out
    )


def test_an_engine_that_cannot_run_is_left_out_with_its_reason(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    absent = DeviceProfile(
        name="gpu",
        description="of another machine",
        engine="onnxruntime-cuda",
        precisions=("fp32",),
        threads=1,
        memory_mb=1000,
        compute_capability="8.6",
    )
    found = tune_tower(Bundle.open(tiny_bundle), "text", [cpu_device, absent])
    ((config, reason),) = found.left_out
    assert config == "onnxruntime-cuda fp32"
    assert reason


def test_a_bundle_that_the_machine_cannot_run_is_refused(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    half = dataclasses.replace(cpu_device, precisions=("fp16",))
    with pytest.raises(BundleError, match="allows fp16"):
        tune_tower(Bundle.open(tiny_bundle), "text", [half])


def test_this_cpu_is_tried_with_some_threads(cpu_device: DeviceProfile) -> None:
    devices = devices_here(dataclasses.replace(cpu_device, threads=8))
    assert devices[0] == dataclasses.replace(cpu_device, threads=8)
    assert {item.threads for item in devices} == {1, 4, 8}
    assert len(set(devices)) == len(devices)
