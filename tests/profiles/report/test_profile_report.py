import dataclasses
import html
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeclip.profiles.record.measurement import Measurement, MeasurementRun
from edgeclip.profiles.report.profile_data import (
    NamedRun,
    SubjectQuality,
    load_runs,
    subjects_of,
)
from edgeclip.profiles.report.profile_inside import drawable_layers
from edgeclip.profiles.report.profile_report import profile_page, write_profile_report
from edgeclip.profiles.report.sections import AdviceNote, Note, Section, Table
from edgeclip.profiles.report.write_page import html_of, markdown_of
from edgeclip.profiles.sensors.interference import judge_interference
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.stats.interval import Interval
from tests.page import Page, visible
from tests.profiles.report.profile_factory import (
    advice,
    alone,
    disturbed_run,
    quality,
    quiet_run,
    two_runs,
    with_items,
)
from tests.profiles.report.test_bundle_report import HOSTILE

pytestmark = pytest.mark.slow


def bare(item: Measurement) -> Measurement:
    """What is left of a measurement that asked for the least."""
    return dataclasses.replace(
        item,
        ratio=None,
        sweep=(),
        samples_ms=(),
        identity=None,
        cold_start=None,
        scenarios=(),
        energy=None,
        stages=(),
        layers=None,
        peak_memory_mb=None,
        missing=(),
    )


def sections_of(runs: tuple[NamedRun, ...], **more: Any) -> tuple[Section, ...]:
    return profile_page(runs, **more).sections


def told(runs: tuple[NamedRun, ...], **more: Any) -> str:
    """All text of the page, without the time that its pictures take."""
    text = html.unescape(markdown_of(profile_page(runs, **more)))
    return text.replace("\\", "").replace("<!-- -->", "")


@pytest.fixture(scope="module")
def rich() -> str:
    """The page of two runs with everything there is."""
    return html_of(profile_page(alone(quiet_run()), quality=quality(), advice=advice()))


def anchors(runs: tuple[NamedRun, ...], **more: Any) -> list[str]:
    return [section.anchor for section in sections_of(runs, **more)]


def test_page_is_well_formed_and_needs_no_network(rich: str) -> None:
    page = Page(rich)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    ids = re.findall(r' id="([^"]+)"', rich)
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", rich)) <= set(ids)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in rich.replace("url(#", "")
    assert "@import" not in rich
    assert "nan" not in visible(rich).lower().split()


def test_every_part_of_a_rich_profile_is_shown() -> None:
    found = anchors(two_runs(), quality=quality(), advice=advice())
    assert found == [
        *("advice", "quality", "latency", "histograms", "ratios", "scenarios", "sweep", "start"),
        *("energy", "stages", "layers", "spread", "missing", "subjects", "environment"),
        "repeat",
    ]
    text = told(two_runs(), quality=quality(), advice=advice())
    for wanted in (
        "student int8 · epyc",
        "-0.35 points",
        "0.99712",
        "✗ INVALID",
        "Early stopping: 99.00 percentile latency bound was not met",
        "Energy of 9 of 11 subjects on laptop",
        "not available (no energy counter may be read",
        "RAPL packages",
        "Decode JPEG at a smaller scale",
        "about 0.11 ms (16%)",
        "memory 21.4 GB/s",
        "opaque_fusion_0",
        "matmul-256 v1",
        "perf_event_paranoid is 4",
        "3,398 MHz (3,390 to 3,401) ⟶ 1,600 MHz (1,587 to 1,612)",
        "212 times ⟶ 1,841 times",
        "performance",
        "avx512_vnni",
        "sha256 5a5a5a5a5a5a",
        "edgeclip profile student teacher --workload full --out epyc.json",
    ):
        assert wanted in text, wanted


def test_every_latency_stands_beside_its_interval() -> None:
    tables = [
        block
        for section in sections_of(alone(quiet_run()))
        if section.anchor == "latency"
        for block in section.blocks
        if isinstance(block, Table)
    ]
    rows = [row for table in tables for row in table.rows]
    assert len(rows) == len(quiet_run().measurements)
    for row in rows:
        for cell in row[1:6]:
            assert re.fullmatch(r"[\d.,]+ to [\d.,]+", cell.small), cell


def test_what_was_not_measured_is_left_out() -> None:
    run = quiet_run()
    run = dataclasses.replace(
        run,
        measurements=(bare(run.measurements[0]),),
        device=None,
        before=None,
        after=None,
        interference=None,
        yardstick=None,
        roofline=None,
    )
    assert anchors(alone(run)) == ["latency", "environment", "repeat"]
    text = told(alone(run))
    assert "None" not in text
    assert "not available" not in text


def test_a_run_of_nothing_is_still_a_page() -> None:
    run = dataclasses.replace(quiet_run(), measurements=(), yardstick=None)
    assert anchors(alone(run)) == ["environment", "repeat"]
    assert Page(html_of(profile_page(alone(run)))).open == []


def test_a_percentile_that_is_not_known_says_so() -> None:
    run = quiet_run()
    item = run.measurements[0]
    few = dataclasses.replace(item.latency, runs=40, p99_ms=None, p99_9_ms=None)
    run = dataclasses.replace(run, measurements=(dataclasses.replace(item, latency=few),))
    assert told(alone(run)).count("too few") >= 2


def test_runs_side_by_side_say_where_they_differ() -> None:
    text = told(two_runs())
    assert "The runs differ in their processors, systems, package versions" in text
    rows = next(s for s in sections_of(two_runs()) if s.anchor == "environment").blocks[1]
    assert isinstance(rows, Table)
    small = {row[0].text: row[0].small for row in rows.rows}
    assert small["onnxruntime"] == "differs"
    assert small["edgeclip"] == ""
    assert small["measured"] == ""
    same = (NamedRun(name="a", run=quiet_run()), NamedRun(name="b", run=quiet_run()))
    assert "All runs are of one kind of machine" in told(same)


def test_a_sensor_that_is_not_there_is_not_left_out() -> None:
    run = quiet_run()
    assert run.before is not None
    assert run.after is not None
    blind = dataclasses.replace(run.before, governor=None, temperatures_c=(), throttle_counts=())
    run = dataclasses.replace(run, before=blind, after=blind)
    environment = next(s for s in sections_of(alone(run)) if s.anchor == "environment")
    (table,) = (block for block in environment.blocks if isinstance(block, Table))
    told = {row[0].text: row[1].text for row in table.rows}
    assert told["governor"] == told["temperatures"] == "not available"
    assert told["load, last minute"] == "0.04"


def test_subjects_of_several_runs_lie_side_by_side() -> None:
    labels = [s.label for s in subjects_of(two_runs()) if s.item.part == "image"]
    assert labels[:2] == ["student fp32 · epyc", "student fp32 · laptop"]
    assert len(labels) == len(set(labels))


def test_missing_things_of_everyone_are_told_once() -> None:
    run = with_items(quiet_run(), energy=None, missing=(("energy", "no sensor"),))
    section = next(s for s in sections_of(alone(run)) if s.anchor == "energy")
    assert [block.text for block in section.blocks if isinstance(block, Note)] == [
        "Energy: not available (no sensor)"
    ]


def test_layers_that_cannot_be_drawn_keep_their_number() -> None:
    item = next(m for m in quiet_run().measurements if m.layers is not None)
    assert item.layers is not None
    found = drawable_layers(item.layers)
    assert all(item.layers.layers[number - 1] is layer for number, layer in found)
    drawn = {layer.name for _, layer in found}
    assert "opaque_fusion_0" not in drawn  # unknown
    assert "/vision_model/Reshape" not in drawn  # no operations at all
    assert "Sub_3" in drawn


def test_a_roofline_that_was_not_measured_is_told() -> None:
    assert "peaks of this machine were not measured" in told(
        (NamedRun(name="laptop", run=disturbed_run()),)
    )


def test_a_disturbed_roofline_is_told_with_its_reason() -> None:
    run = quiet_run()
    assert run.roofline is not None
    for share, doubted in ((0.4, True), (0.01, False)):
        roof = dataclasses.replace(
            run.roofline, interference=judge_interference(others_share=share)
        )
        page = told(alone(dataclasses.replace(run, roofline=roof)))
        words = "DISTURBED while the peaks were measured: other programs used 40%"
        assert (words in page) is doubted


def hostile_run() -> MeasurementRun:
    """A run with HTML wherever a file can hold text."""
    run = disturbed_run()
    items: list[Measurement] = []
    for item in (*quiet_run().measurements[::4], *run.measurements[:1]):
        assert item.identity is not None
        identity = dataclasses.replace(
            item.identity, bundle=HOSTILE, engine=HOSTILE, provider=HOSTILE
        )
        layers = item.layers and dataclasses.replace(
            item.layers,
            source=HOSTILE,
            layers=tuple(
                dataclasses.replace(layer, name=HOSTILE, op=HOSTILE, provider=HOSTILE)
                for layer in item.layers.layers
            ),
        )
        energy = item.energy and dataclasses.replace(item.energy, sensor=HOSTILE, covers=HOSTILE)
        scenarios = tuple(
            dataclasses.replace(one, valid=False, reasons=(HOSTILE,)) for one in item.scenarios
        )
        items.append(
            dataclasses.replace(
                item,
                name=f"{len(items)} {HOSTILE}",
                identity=identity,
                layers=layers,
                energy=energy,
                scenarios=scenarios,
                ratio=item.ratio and dataclasses.replace(item.ratio, reference=HOSTILE),
                missing=((HOSTILE, HOSTILE), ("energy", HOSTILE)),
            )
        )
    assert run.interference is not None
    assert run.before is not None
    assert run.yardstick is not None
    before = dataclasses.replace(
        run.before,
        governor=HOSTILE,
        temperatures_c=((HOSTILE, 1.0),),
        throttle_counts=((HOSTILE, 1),),
        gpu=((HOSTILE, HOSTILE),),
    )
    machine = dataclasses.replace(
        run.machine, cpu=HOSTILE, os=HOSTILE, python=HOSTILE, packages=((HOSTILE, HOSTILE),)
    )
    roofline = quiet_run().roofline
    assert roofline is not None
    peaks = tuple((HOSTILE, peak) for _, peak in roofline.peak_gflops)
    return dataclasses.replace(
        run,
        created=HOSTILE,
        command=HOSTILE,
        machine=machine,
        measurements=tuple(items),
        before=before,
        interference=dataclasses.replace(run.interference, reasons=(HOSTILE,)),
        yardstick=dataclasses.replace(run.yardstick, name=HOSTILE),
        roofline=dataclasses.replace(roofline, method=HOSTILE, peak_gflops=peaks),
    )


def test_escapes_everything_that_comes_from_files() -> None:
    few = dataclasses.replace(quiet_run(), measurements=quiet_run().measurements[:1])
    runs = (
        NamedRun(name=HOSTILE, run=hostile_run()),
        NamedRun(name=f"b {HOSTILE}", run=few),
    )
    figure = SubjectQuality(
        metric=HOSTILE,
        value=Interval(0.5, 0.4, 0.6),
        unit="share",
        sha256=None,
        precision=None,
        part=None,
    )
    note = AdviceNote(
        subject=HOSTILE, title=HOSTILE, text=HOSTILE, evidence=(HOSTILE,), gain=HOSTILE
    )
    written = html_of(profile_page(runs, quality=(figure,), advice=(note,)))
    assert "<script" not in written.lower()
    page = Page(written)
    assert page.open == []
    assert not any(address.startswith("javascript") for address in page.addresses)
    assert visible(written).count(HOSTILE) >= 40


def test_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "pages" / "profile.html"
    run = dataclasses.replace(quiet_run(), measurements=quiet_run().measurements[-1:])
    write_profile_report(alone(run), out)
    before = out.read_bytes()
    assert before.endswith(b"</html>")
    with pytest.raises(InputError, match="needs a measurement"):
        write_profile_report((), out)
    assert out.read_bytes() == before
    assert [file.name for file in out.parent.iterdir()] == ["profile.html"]


def test_a_page_is_not_heavy(rich: str) -> None:
    assert len(rich.encode()) < 2_000_000


def test_missing_jinja_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"edgeclip\[report\]"):
        html_of(profile_page(alone(quiet_run())))


def test_runs_are_called_as_their_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "x" / "b.json", tmp_path / "y" / "b.json"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        quiet_run().save(path)
    assert [one.name for one in load_runs(paths)] == ["a", "x/b", "y/b"]
    twice = [one.name for one in load_runs([paths[1], paths[1]])]
    assert twice == ["x/b", "x/b #2"]
