"""`edgeclip profile` as a user types it, on the tiny bundle."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.profiles.record.measurement import MeasurementRun
from edgeclip.profiles.report.profile_data import NamedRun
from edgeclip.profiles.report.profile_report import advice_of
from edgeclip.profiles.report.tables import long_table, write_parquet
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.planning.plan import SplitPlan
from tests.conftest import SPACE

pytestmark = pytest.mark.slow

WORKLOAD = """\
name: tiny
description: as little as there can be
batch_sizes: [1, 3]
min_warmup_runs: 3
max_warmup_seconds: 0.2
repeats: 10
processes: 2
seconds_per_batch: 0.05
cold_starts: 1
scenarios: [SingleStream, Offline]
scenario_seconds: 0.1
scenario_queries: 10
roofline_seconds: 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    (path / "tiny.yaml").write_text(WORKLOAD)
    brief = WORKLOAD.replace("[SingleStream, Offline]", "[]").replace("[1, 3]", "[1]")
    (path / "brief.yaml").write_text(brief.replace("cold_starts: 1", "cold_starts: 0"))
    return path


@pytest.fixture(scope="module")
def measured(folder: Path, tiny_bundle: Path) -> MeasurementRun:
    words = ["profile", tiny_bundle, "--workload", folder / "tiny.yaml", "--out", folder / "a.json"]
    words += ["--report", folder / "a.html", "--markdown", folder / "a.md"]
    words += ["--parquet", folder / "a.parquet"]
    assert main([str(word) for word in words]) == 0
    return MeasurementRun.load(folder / "a.json")


def brief(folder: Path, *words: str | Path) -> int:
    common = ("--workload", folder / "brief.yaml", "--parts", "text", "--brief")
    return main(["profile", *map(str, (*words, *common))])


def test_every_part_and_precision_is_there(measured: MeasurementRun) -> None:
    names = [(item.part, item.name) for item in measured.measurements]
    assert names[:4] == [("image", "fp32"), ("image", "int8"), ("text", "fp32"), ("text", "int8")]
    assert [part for part, _ in names[4:]] == ["file"]
    for item in measured.measurements:
        assert [len(process) for process in item.samples_ms] == [10, 10]
        assert [result.scenario for result in item.scenarios] == ["SingleStream", "Offline"]
        assert {point.batch for point in item.sweep} == {1, 3}
        assert item.identity is not None
        assert item.energy is not None or "energy" in dict(item.missing)
    assert measured.command.startswith("edgeclip profile ")
    assert measured.yardstick is not None
    assert measured.interference is not None


def test_time_is_looked_into(measured: MeasurementRun) -> None:
    by_part = {item.part: item for item in measured.measurements}
    assert [stage.name for stage in by_part["file"].stages][:3] == ["read", "decode", "resize"]
    layers = by_part["image"].layers
    assert layers is not None
    assert {layer.op for layer in layers.layers} >= {"GlobalAveragePool"}
    assert measured.roofline is not None


def test_all_that_was_asked_for_is_written(measured: MeasurementRun, folder: Path) -> None:
    page = (folder / "a.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert 'src="http' not in page
    assert "| " in (folder / "a.md").read_text(encoding="utf-8")
    assert (folder / "a.parquet").stat().st_size > 0


def test_advice_to_measure_again_is_given_once(measured: MeasurementRun) -> None:
    assert measured.interference is not None
    interference = replace(measured.interference, disturbed=True, reasons=("a neighbour",))
    run = NamedRun(name="x", run=replace(measured, interference=interference))
    assert sum("Measure again" in note.title for note in advice_of([run])) == 1


def test_the_long_table_merges_runs(measured: MeasurementRun, folder: Path) -> None:
    from pyarrow import parquet

    write_parquet([measured, measured], folder / "two.parquet")
    table = parquet.read_table(folder / "two.parquet")
    rows = long_table([measured])
    assert table.num_rows == 2 * len(rows)
    first = measured.measurements[0]
    (p50,) = (
        row
        for row in rows
        if (row.part, row.name, row.scenario, row.metric)
        == (first.part, first.name, "turns", "p50")
    )
    median = first.latency.p50_ms
    known = [end if math.isfinite(end) else None for end in (median.low, median.high)]
    assert (p50.value, p50.low, p50.high) == (median.value, *known)


def test_the_same_bundle_is_no_regression(
    measured: MeasurementRun, folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = ("--against", folder / "a.json", "--max-regression", "900%")
    assert brief(folder, tiny_bundle, *against) == 0
    assert "fp32" in capsys.readouterr().out


def test_a_baseline_of_another_machine_is_refused_at_once(
    measured: MeasurementRun, folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(measured, machine=replace(measured.machine, cpu="another"))
    other.save(folder / "other.json")
    against = ("--against", folder / "other.json", "--max-regression", "5%")
    assert brief(folder, tiny_bundle, *against) == 2
    assert "is of another machine (another, " in capsys.readouterr().err


def test_several_bundles_take_turns_with_a_peer(
    folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The texts of a peer are as long as they are told to be."""
    peer = tiny_bundle / "onnx" / "text_model.onnx"
    out = tmp_path / "b.json"
    words = (f"a={tiny_bundle}", f"b={tiny_bundle}", "--peer", f"text:plain={peer}", "--out", out)
    assert brief(folder, *words, "--peer-axis", "input_ids.1=7", "--reference", "b int8") == 0
    found = MeasurementRun.load(out)
    assert [item.name for item in found.measurements] == [
        *("a fp32", "a int8", "b fp32", "b int8"),
        "plain",
    ]
    assert found.measurements[1].ratio is not None
    assert found.measurements[1].ratio.reference == "b int8"
    assert found.measurements[4].input_shape == (1, 7)
    assert found.roofline is None


def test_a_part_that_is_asked_for_twice_is_there_once(
    folder: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    made, out = tmp_path / "plan.json", tmp_path / "c.json"
    SplitPlan(name="alone", kind="device", space=SPACE).save(made)
    words = (tiny_bundle, "--parts", "split,split", "--plan", made, "--brief", "--out", out)
    assert main(["profile", *map(str, words), "--workload", str(folder / "brief.yaml")]) == 0
    assert [item.name for item in MeasurementRun.load(out).measurements] == ["alone"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure"),
        (["BUNDLE", "--parts", "audio"], "there is no part 'audio'"),
        (["BUNDLE", "--max-regression", "5%"], "--max-regression needs --against"),
        (["BUNDLE", "--server", "http://x"], "go with --plan"),
        (["BUNDLE", "--peer", "model.onnx"], "write PART:NAME=FILE.onnx"),
        (["BUNDLE", "--peer-axis", "length=7"], "--peer-axis goes with --peer"),
        (["BUNDLE", "--reference", "fp23"], "'fp23' is no subject: choose from fp32, int8"),
        (["BUNDLE", "--workload", "huge"], "huge"),
        (["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(
    words: list[str], message: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tiny_bundle) if word == "BUNDLE" else word for word in words]
    assert main(["profile", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
