import dataclasses
import json
import platform

import numpy as np

from edgeclip.runtime.device.machine import Machine, detect_machine
from edgeclip.runtime.device.schema import parse


def test_this_machine_is_described() -> None:
    machine = detect_machine()
    assert machine.cores >= 1
    assert platform.python_version() in machine.python
    packages = dict(machine.packages)
    assert packages["numpy"] == np.__version__
    assert "edgeclip" in packages


def test_a_machine_survives_json() -> None:
    machine = detect_machine()
    data = json.loads(json.dumps(dataclasses.asdict(machine)))
    assert parse(Machine, data, source="test") == machine
