import dataclasses

import pytest

from edgeclip.profiles.record.measurement import Measurement, Yardstick
from edgeclip.profiles.report.profile_data import NamedRun, subjects_of
from edgeclip.profiles.report.profile_report import MOST_ADVICE, advice_of, profile_page
from edgeclip.profiles.report.profile_speed import spread_of
from edgeclip.profiles.report.profile_summary import summary_of
from edgeclip.profiles.report.sections import Note
from edgeclip.profiles.report.write_page import markdown_of
from tests.profiles.report.profile_factory import (
    alone,
    disturbed_run,
    quality,
    quiet_run,
    two_runs,
    with_items,
)


def test_a_quiet_machine_is_told_so_and_no_alarm_rings() -> None:
    run = with_items(quiet_run(), scenarios=())
    summary = summary_of(alone(run), subjects_of(alone(run)), ())
    assert summary.tone == "pass"
    assert summary.alarms == ()


def test_a_disturbed_and_throttled_machine_is_told_loudly() -> None:
    runs = (NamedRun(name="laptop", run=disturbed_run()),)
    summary = summary_of(runs, subjects_of(runs), ())
    assert summary.tone == "miss"
    assert "do not trust" in summary.verdict
    loud = " ".join(alarm.text for alarm in summary.alarms if alarm.tone == "miss")
    for wanted in ("DISTURBED", "24% of the CPU time", "THROTTLED", "teacher fp16", "INVALID"):
        assert wanted in loud
    assert "CONTENDED" not in loud  # said already
    text = markdown_of(profile_page(runs))
    assert text.index("DISTURBED") < text.index("#### ")


def test_contended_runs_ring_without_an_account_of_interference() -> None:
    run = dataclasses.replace(disturbed_run(), interference=None)
    runs = alone(run)
    summary = summary_of(runs, subjects_of(runs), ())
    assert any("CONTENDED" in alarm.text for alarm in summary.alarms)
    assert "do not trust" in summary.verdict


def test_what_cannot_be_told_is_not_called_quiet() -> None:
    run = with_items(quiet_run(), scenarios=(), contended=None)
    for interference in (
        None,
        dataclasses.replace(run.interference, disturbed=None, throttled=None)
        if run.interference
        else None,
    ):
        runs = alone(dataclasses.replace(run, interference=interference))
        summary = summary_of(runs, subjects_of(runs), ())
        assert summary.tone == ""
        assert "not known" in summary.verdict


def test_cards_name_the_fastest_and_what_is_as_fast() -> None:
    runs = alone(quiet_run())
    first, second, third = summary_of(runs, subjects_of(runs), quality()).cards
    assert first.name == "Fastest p50, image tower"
    assert first.note.startswith("student int8; 0.565 of student fp32's time")
    assert "not surely" not in first.note
    assert second.figure.endswith("/s")
    assert "batch" in second.note
    assert third.figure == "-0.35 points"


def test_processes_decide_what_is_surely_faster() -> None:
    fp32, int8 = (
        next(item for item in quiet_run().measurements if item.name == name)
        for name in ("student fp32", "student int8")
    )
    assert "not surely" not in _first_note((fp32, int8))
    pace = [0.9, 1.1, 0.95, 1.05, 1.0]
    near = tuple(
        tuple(0.98 * by * ms for ms in runs) for by, runs in zip(pace, fp32.samples_ms, strict=True)
    )
    note = _first_note((fp32, dataclasses.replace(int8, samples_ms=near)))
    assert note.endswith("not surely faster than student fp32")


def test_a_single_process_tells_nothing_of_what_is_faster() -> None:
    items = tuple(
        dataclasses.replace(item, samples_ms=item.samples_ms[:1])
        for item in quiet_run().measurements
        if item.name in ("student fp32", "student int8")
    )
    note = _first_note(items)
    assert note.endswith("not surely faster than student fp32: one process tells nothing of others")


def _first_note(items: tuple[Measurement, ...]) -> str:
    runs = alone(dataclasses.replace(quiet_run(), measurements=items))
    return summary_of(runs, subjects_of(runs), ()).cards[0].note


def test_answers_without_the_server_are_told_loudly() -> None:
    run = quiet_run()
    item = dataclasses.replace(
        run.measurements[0],
        part="split",
        missing=(("server", "3 of 220 answers are the device's own: deadline"),),
    )
    runs = alone(dataclasses.replace(run, measurements=(item,)))
    (alarm,) = summary_of(runs, subjects_of(runs), ()).alarms
    assert alarm.tone == "miss"
    assert "3 of 220 answers are the device's own" in alarm.text
    remarks = next(s for s in profile_page(runs).sections if s.anchor == "missing")
    assert [block.text for block in remarks.blocks if isinstance(block, Note)] == [
        "Server: 3 of 220 answers are the device's own: deadline"
    ]


def test_spread_loses_what_the_yardstick_shares() -> None:
    ours = ((10.0, 10.0), (20.0, 20.0), (15.0, 15.0))
    stick = Yardstick(name="y", samples_ms=((1.0,), (2.0,), (1.5,)))
    found = spread_of(ours, stick)
    assert found is not None
    assert found.medians == (10.0, 20.0, 15.0)
    assert found.plain == pytest.approx(1.0)
    assert found.by_yardstick == pytest.approx(0.0)
    other = spread_of(ours, Yardstick(name="y", samples_ms=((1.0,),)))
    assert other is not None
    assert other.by_yardstick is None
    assert spread_of(((10.0,),), stick) is None
    assert spread_of((), None) is None


def test_advice_comes_once_for_a_run_and_the_best_first() -> None:
    notes = advice_of(alone(quiet_run()))
    assert 0 < len(notes) <= MOST_ADVICE
    assert len({note.title for note in notes}) == len(notes)
    assert all(note.title and note.evidence for note in notes)
    assert all("·" not in note.subject for note in notes)
    gains = [float(note.gain.split()[-2]) for note in notes if note.gain]
    assert gains == sorted(gains, reverse=True)


def test_doubts_about_a_run_come_before_its_other_advice() -> None:
    notes = [note for note in advice_of(two_runs()) if note.subject.endswith("laptop")]
    assert notes[0].subject == "all subjects · laptop"
    assert [note.subject for note in notes].count("all subjects · laptop") == 1
    assert len(notes) <= MOST_ADVICE
    assert advice_of(alone(dataclasses.replace(quiet_run(), device=None))) == ()
