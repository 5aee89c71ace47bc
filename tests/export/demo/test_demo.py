"""The demo on the bundle and the teacher that are kept in the repository."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.export.demo.demo import DemoSettings, run_demo
from edgeclip.export.demo.summary import DemoSummary
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.stats.interval import Interval

pytestmark = pytest.mark.slow

LEAST = """\
name: least
description: latency at batch 1, hardly measured
batch_sizes: [1]
min_warmup_runs: 3
max_warmup_seconds: 0.1
repeats: 10
seconds_per_batch: 0.05
cold_starts: 0
"""


def runs_int8() -> bool:
    """Whether the kept bundle's int8, made for CPUs with int8 dot products, runs here."""
    return load_device("this-machine").vnni


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoSummary]:
    """A quick run with few scenes, and what it says of itself."""
    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(quick=True, test_scenes=60, unseen_scenes=20, workload="quick")
    return out, run_demo(settings, out, command="edgeclip demo --quick")


def test_summary_says_what_the_run_found(made: tuple[Path, DemoSummary]) -> None:
    out, summary = made
    written = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for name in (
        *("teacher_r1", "student_fp32_r1", "student_int8_r1", "retention", "latency_ratio"),
        *("intervals", "seconds"),
    ):
        assert name in written
    assert written["retention"] == summary.retention
    assert written["student"] == "kept in the repository"
    interval = written["intervals"]["retention"]
    assert interval["low"] <= written["retention"] <= interval["high"]


def test_the_kept_student_knows_the_scenes(made: tuple[Path, DemoSummary]) -> None:
    # Among 60 captions, chance is under 2%.
    _, summary = made
    assert summary.teacher_r1 > 0.9
    assert summary.student_chosen_r1 > 0.9
    if runs_int8():
        assert summary.student_int8_r1 is not None
        assert abs(summary.student_fp32_r1 - summary.student_int8_r1) < 0.05
    else:
        assert summary.student_int8_r1 is None


def test_the_report_is_one_whole_page(made: tuple[Path, DemoSummary]) -> None:
    page = (made[0] / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert "teacher ONNX" in page
    assert "OpenMoji" in page
    assert "http-equiv" in page  # the policy that keeps the page from fetching anything


def test_measurements_are_kept(made: tuple[Path, DemoSummary]) -> None:
    run = json.loads((made[0] / "measurements.json").read_text(encoding="utf-8"))
    names = {item["name"] for item in run["measurements"]}
    assert {"teacher torch", "teacher ONNX", "student fp32"} <= names
    assert ("student int8" in names) is runs_int8()


def test_a_ratio_without_a_bound_is_saved(made: tuple[Path, DemoSummary], tmp_path: Path) -> None:
    unknown = made[1].intervals | {"latency_ratio": Interval(0.1, 0.0, math.inf)}
    replace(made[1], intervals=unknown).save(tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert written["intervals"]["latency_ratio"] == {"value": 0.1, "low": 0.0, "high": None}


def test_a_processor_without_int8_dot_products_gets_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(load_device("this-machine"), vnni=False)
    monkeypatch.setattr("edgeclip.export.demo.demo.load_device", lambda _: plain)
    (tmp_path / "least.yaml").write_text(LEAST)
    least = str(tmp_path / "least.yaml")
    settings = DemoSettings(quick=True, test_scenes=20, unseen_scenes=10, workload=least)
    summary = run_demo(settings, tmp_path / "demo", command="edgeclip demo --quick")
    assert "int8" not in summary.chosen
    assert summary.student_int8_r1 is None
