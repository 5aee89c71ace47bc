import dataclasses
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import TowerManifest
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.towers.fallback import choose_precision, usable_precisions


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
