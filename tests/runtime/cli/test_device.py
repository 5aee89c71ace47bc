"""`edgeclip device`."""

from pathlib import Path

import pytest

from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import load_device


def test_device_prints_what_load_device_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["device", "jetson-orin-nano"]) == 0
    path = tmp_path / "jetson.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_device(path) == load_device("jetson-orin-nano")
    assert main(["device", "--out", str(tmp_path / "here.yaml")]) == 0
    assert load_device(tmp_path / "here.yaml") == load_device("this-machine")
    capsys.readouterr()
    assert main(["device", "--list"]) == 0
    assert "rtx-4000-ada" in capsys.readouterr().out
