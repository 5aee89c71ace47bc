import json
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.towers.tuning import find_tuning

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))


def test_what_is_found_is_kept_used_and_forgotten(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["tune", str(tiny_bundle), "--tower", "text", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"text"}
    assert found["text"]["chosen"] in [item["configuration"] for item in found["text"]["timed"]]
    kept = find_tuning(Bundle.open(tiny_bundle))
    assert kept is not None
    assert [item.tower for item in kept.towers] == ["text"]
    assert str(kept.towers[0]) == f"text tower: {found['text']['chosen']}"
    assert Encoder.open(tiny_bundle).devices["text"] == kept.towers[0].device
    assert main(["tune", str(tiny_bundle), "--tower", "image"]) == 0
    printed = capsys.readouterr().out
    assert "image tower" in printed
    assert "chosen: " in printed
    both = find_tuning(Bundle.open(tiny_bundle))
    assert both is not None
    assert {item.tower for item in both.towers} == {"image", "text"}
    assert main(["tune", str(tiny_bundle), "--forget"]) == 0
    assert find_tuning(Bundle.open(tiny_bundle)) is None


def test_mistakes_are_told_in_one_line(image_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    for words in (
        [str(image_bundle), "--tower", "text"],
        [str(tmp_path / "nowhere")],
        [str(image_bundle), "--also", "no-such-device"],
    ):
        assert main(["tune", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("edgeclip: error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
