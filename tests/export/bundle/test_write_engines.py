"""Bundles for devices with TensorRT: engines where they can be built, a script where not."""

import importlib.util
import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.write_engines import BUILD_SCRIPT, targets_table
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import device_names, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, EdgeClipError
from edgeclip.runtime.towers.tower_runner import graph_source

pytestmark = pytest.mark.slow

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)


@pytest.fixture(scope="session")
def ada(fp32_plan: BundlePlan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plan = replace(fp32_plan, device=load_device("rtx-4000-ada"), precisions=("fp16", "int8"))
    return build_bundle(plan, tmp_path_factory.mktemp("ada") / "bundle").bundle


@needs_rtx
def test_engines_are_built_ahead_and_declared(ada: Bundle) -> None:
    engines = ada.manifest.engines
    assert [(item.tower, item.precision) for item in engines] == [
        *(("image", "fp16"), ("text", "fp16"), ("image", "int8"), ("text", "int8"))
    ]
    for item in engines:
        assert (ada.path / item.path).stat().st_size > 1000
        assert item.key.capability == "8.9"
        # The hash that the device compares is that of the bundle's own graph.
        assert item.key.graph_sha256 == graph_source(ada, item.tower, item.precision).sha256
    assert ada.manifest.tower("image").chosen == "fp16"
    assert not (ada.path / BUILD_SCRIPT).exists()


@needs_rtx
def test_an_altered_engine_is_refused(ada: Bundle) -> None:
    path = ada.path / ada.manifest.engines[0].path
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(BundleError, match="was altered"):
            Bundle.open(ada.path)
    finally:
        path.write_bytes(before)


@needs_rtx
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_running_them_is_one_clear_error(ada: Bundle) -> None:
    encoder = Encoder.open(ada.path, device="rtx-4000-ada")
    with pytest.raises(EdgeClipError) as caught:
        encoder.encode_text("red")
    assert "\n" not in str(caught.value)


def test_the_bundle_of_a_gpu_runs_on_a_cpu_too(ada: Bundle, plan: BundlePlan) -> None:
    encoder = Encoder.open(ada.path, device=plan.device, precision="fp32")
    assert encoder.encode_text("red").shape == (1, 16)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_a_device_that_must_build_gets_a_script(
    fp32_plan: BundlePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edgeclip.export")
    plan = replace(fp32_plan, device=load_device("jetson-orin-nano"), precisions=("fp16",))
    bundle = build_bundle(plan, tmp_path / "bundle").bundle
    assert any(BUILD_SCRIPT in line and "built on the device" in line for line in caplog.messages)
    assert bundle.manifest.engines == ()
    script = bundle.path / BUILD_SCRIPT
    assert os.access(script, os.X_OK)
    assert BUILD_SCRIPT in {file.path for file in bundle.manifest.files}
    assert _asked_by(script) == [f"{word} . --device jetson-orin-nano" for word in COMMANDS]
    assert _asked_by(script, "mine.yaml") == [f"{word} . --device mine.yaml" for word in COMMANDS]
    done = subprocess.run([script], env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "edgeclip is not on the PATH" in done.stderr


COMMANDS = ("build", "verify")


def _asked_by(script: Path, *given: str) -> list[str]:
    """Run a script with a program in edgeclip's place; return what it was called with."""
    folder = script.parent.parent / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / "edgeclip"
    program.write_text('#!/bin/sh\necho "$*"\n', encoding="utf-8")
    program.chmod(0o755)
    path = {"PATH": f"{folder}:/bin:/usr/bin"}
    done = subprocess.run([script, *given], env=path, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is here")
@pytest.mark.parametrize("name", ["a $(touch planted) b", "it's", "`touch planted`", "${HOME}"])
def test_a_device_name_is_never_run(name: str, fp32_plan: BundlePlan, tmp_path: Path) -> None:
    device = replace(load_device("jetson-orin-nano"), name=name)
    plan = replace(fp32_plan, device=device, precisions=("fp16",))
    bundle = build_bundle(plan, tmp_path / "bundle").bundle
    script = bundle.path / BUILD_SCRIPT
    assert _asked_by(script) == [f"{word} . --device {name}" for word in COMMANDS]
    assert not (bundle.path / "planted").exists()


def test_the_table_of_targets_names_every_device() -> None:
    lines = targets_table().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(device_names())
    here = next(line for line in lines if line.startswith("this-machine"))
    assert here.endswith("runs here")
