import dataclasses
import json
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.bundle.manifest import DataRecord, GateRecord, GateRemark, gates_table
from edgeclip.runtime.cli.main import main

DATA = DataRecord("photos, 1,000 pictures", 1000, "ab" * 32)
GATE = GateRecord(
    name="R@1 loss int8 images, fp32 texts",
    value=0.25,
    low=-0.1,
    high=0.6,
    bound=1.0,
    direction="<=",
    unit="points",
    passed=True,
    data=DATA,
)
REMARK = GateRemark("image int8", "zero-shot top-1 loss", "not judged: no labels")


@pytest.fixture
def recorded(own_bundle: Path) -> Path:
    """A bundle whose gates say what they were measured on."""
    manifest = Bundle.open(own_bundle).manifest
    changed = dataclasses.replace(manifest, gates=(GATE,), remarks=(REMARK,))
    (own_bundle / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
    return own_bundle


def test_a_line_for_each_gate_then_data_then_remarks() -> None:
    other = dataclasses.replace(GATE, data=dataclasses.replace(DATA, name="labelled", count=300))
    missed = dataclasses.replace(GATE, value=2.0, passed=False)
    bare = dataclasses.replace(GATE, data=None)
    gates = [("image int8", GATE), ("image int8", other), ("text int8", missed), ("bundle", bare)]
    lines = gates_table(gates, [REMARK]).splitlines()
    assert [line.split()[-2:] for line in lines[1:5]] == [
        *(["[1]", "pass"], ["[2]", "pass"], ["[1]", "miss"], ["points", "pass"])
    ]
    assert "0.25000  -0.10000 to 0.60000  <= 1 points" in lines[1]
    assert lines[5:] == [
        "data [1]: photos, 1,000 pictures; 1,000 measured; sha256 " + "ab" * 8,
        "data [2]: labelled; 300 measured; sha256 " + "ab" * 8,
        "warning: image int8: zero-shot top-1 loss: not judged: no labels",
    ]


def test_nothing_in_a_name_reaches_the_terminal() -> None:
    named = dataclasses.replace(GATE, name="\x1b[31mred\nline")
    table = gates_table([("image\x07", named)], [GateRemark("a\n", "\x1b", "c")])
    assert len(table.splitlines()) == 4
    assert not set("\x1b\x07") & set(table)


def test_verify_prints_what_was_measured(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(recorded)]) == 0
    out = capsys.readouterr().out
    assert "gates, as measured when the bundle was written:" in out
    assert "R@1 loss int8 images, fp32 texts" in out
    assert "data [1]: photos, 1,000 pictures; 1,000 measured" in out
    assert "warning: image int8: zero-shot top-1 loss: not judged: no labels" in out
    assert main(["verify", str(recorded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gates"][-1] == {"what": "bundle", **dataclasses.asdict(GATE)}
    assert found["remarks"] == [dataclasses.asdict(REMARK)]
