"""A profile as JSON: it survives a round trip, and other files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.runtime.errors import ConfigError
from tests.profiles.run_cases import run_with


def one_run() -> MeasurementRun:
    return run_with({"fp32": [np.array([1.0, 2.0, 4.0])]})


def test_json_round_trip(tmp_path: Path) -> None:
    run = one_run()
    run.save(tmp_path / "m.json")
    assert MeasurementRun.load(tmp_path / "m.json") == run


def test_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    data = json.loads(one_run().to_json())
    for change, message in (
        ({"schema_version": 1}, "measure again"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"machine": 3}, "machine"),
    ):
        with pytest.raises(ConfigError, match=message):
            MeasurementRun.from_json(json.dumps({**data, **change}), source="m.json")
    for text in ("{", "[]", "3"):
        with pytest.raises(ConfigError, match=r"m\.json"):
            MeasurementRun.from_json(text, source="m.json")
    with pytest.raises(ConfigError, match="cannot read"):
        MeasurementRun.load(tmp_path / "missing.json")
