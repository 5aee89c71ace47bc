from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.planning.plan import SplitPlan

SPACE = "5" * 64
CUT = SplitPlan(
    name="cut 3 (after block 1), int8",
    kind="cut",
    space=SPACE,
    model="tiny-tail-3",
    codec="int8",
    cut=3,
    deadline_ms=80.0,
    p50_ms=20.5,
    p95_ms=31.0,
    bytes_p95=9216,
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.json"
    CUT.save(path)
    assert SplitPlan.load(path) == CUT


times = st.none() | st.floats(0, 1e6)


@given(p50=times, p95=times, name=st.text(), deadline=st.none() | st.floats(1e-3, 1e6))
def test_round_trip_of_any(
    p50: float | None, p95: float | None, name: str, deadline: float | None
) -> None:
    plan = SplitPlan(
        name=name, kind="device", space=SPACE, p50_ms=p50, p95_ms=p95, deadline_ms=deadline
    )
    assert SplitPlan.from_json(plan.to_json(), source="here") == plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "device", "model": "m"}, "model is not for a plan of kind 'device'"),
        ({"kind": "image", "model": "m"}, "codec is needed for a plan of kind 'image'"),
        ({"kind": "cut", "model": "m", "codec": "int8"}, "cut is needed"),
        ({"kind": "cut", "model": "m", "codec": "int8", "cut": -1}, "cut must be at least 0"),
        ({"kind": "device", "deadline_ms": 0.0}, "deadline_ms must be above 0"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitPlan(name="x", space=SPACE, **fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "schema None of a plan is not 1"),
        ('{"schema_version": 9}', "schema 9 of a plan is not 1"),
        ('{"schema_version": 1, "name": "x", "kind": "other", "space": "5"}', "kind"),
        ('{"schema_version": 1, "name": "x", "kind": "image", "space": "5"}', "model is needed"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        SplitPlan.load(path)


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        SplitPlan.load(tmp_path / "none.json")
