from dataclasses import replace
from pathlib import Path

from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.profile_subjects import ProfilePlan, _cold_start, profile_subjects
from edgeclip.profiles.record.measurement import Identity
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from tests.conftest import QUICK


def test_what_the_bundle_chose_starts_cold(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    """A subject without a precision of its own has that of its bundle."""
    spec = SubjectSpec(name="x", part="image", device=cpu_device, bundle=str(tiny_bundle))
    plan = ProfilePlan(
        specs=(spec,),
        device=cpu_device,
        workload=replace(QUICK, cold_starts=1, processes=1),
        command="typed",
        inside=False,
    )
    (found,) = profile_subjects(plan).measurements
    assert found.identity is not None
    assert found.identity.precision == "int8"
    assert found.cold_start is not None
    size = (tiny_bundle / "onnx" / "vision_device_int8.onnx").stat().st_size
    assert found.cold_start.file_bytes == size


def test_a_cold_start_that_fails_costs_nothing_else(tiny_bundle: Path) -> None:
    """TensorRT loads engines, not graphs; the report says so where its figures would be."""
    device = load_device("jetson-orin-nano")
    spec = SubjectSpec(name="x", part="image", device=device, bundle=str(tiny_bundle))
    identity = Identity(
        bundle="tiny",
        sha256="a" * 64,
        precision="fp32",
        engine=device.engine,
        provider="TensorRT",
        threads=1,
        bytes_on_disk=1,
        input_shape=(1, 8, 8, 3),
    )
    why = _cold_start(spec, identity, 1)
    assert isinstance(why, str)
    assert "runs TensorRT engines, not the graph" in why
