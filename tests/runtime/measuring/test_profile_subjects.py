from dataclasses import replace
from pathlib import Path

from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.measuring.profile_subjects import ProfilePlan, profile_subjects
from edgeclip.runtime.measuring.subject import SubjectSpec
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
