"""A DeviceProfile as the YAML that `load_device` reads."""

import dataclasses

import yaml

from edgeclip.profiles.device import DeviceProfile


def device_yaml(device: DeviceProfile) -> str:
    """All fields of `device` in their order, as YAML text."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(device).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
