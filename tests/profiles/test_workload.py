import dataclasses
import json
from typing import Any

import pytest

from edgeclip.profiles.workload import Workload, load_workload, workload_names
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError


def test_the_built_in_workloads_are_these() -> None:
    assert workload_names() == ("ci", "demo", "quick", "standard")


@pytest.mark.parametrize("name", workload_names())
def test_every_built_in_workload_survives_json(name: str) -> None:
    workload = load_workload(name)
    assert workload.name == name
    data = json.loads(json.dumps(dataclasses.asdict(workload)))
    assert parse(Workload, data, source="test") == workload


def test_quick_does_less_than_demo() -> None:
    quick, demo = load_workload("quick"), load_workload("demo")
    assert quick.repeats < demo.repeats
    assert quick.seconds_per_batch < demo.seconds_per_batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"batch_sizes": ()}, "batch_sizes must be 1, then"),
        ({"batch_sizes": (8, 1)}, "batch_sizes must be 1, then"),
        ({"batch_sizes": (1, 8, 8)}, "batch_sizes must be 1, then"),
        ({"batch_sizes": (0, 1)}, "batch_sizes must be 1, then"),
        ({"min_warmup_runs": 0}, "min_warmup_runs must be at least 1"),
        ({"max_warmup_seconds": 0.0}, "max_warmup_seconds must be above 0"),
        ({"repeats": 2}, "repeats must be at least 3"),
        ({"seconds_per_batch": -1.0}, "seconds_per_batch must be above 0"),
        ({"cold_starts": -1}, "cold_starts must be at least 0"),
    ],
)
def test_values_out_of_bounds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(load_workload("demo"), **changes)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no workload is named 'long'.*demo, quick"):
        load_workload("long")
