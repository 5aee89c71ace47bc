from dataclasses import replace

import pytest

from edgeclip.runtime.device.device_profile import DeviceProfile


@pytest.fixture(scope="session")
def cpu_device(cpu_device: DeviceProfile) -> DeviceProfile:
    """As everywhere, but int8 is exact, also where this processor's kernels would saturate."""
    return replace(cpu_device, vnni=True)
