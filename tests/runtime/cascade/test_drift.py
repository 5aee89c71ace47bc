"""False alarms, delays and restarts of the drift watch, on streams with and without a shift."""

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.cascade.drift import (
    WATCHED_ERROR,
    DriftRule,
    DriftState,
    DriftWatch,
    WatchedShare,
    default_state_path,
)
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Interval

DIGEST = "d" * 64
INTERVAL = Interval(0.2, 0.16, 0.24)
WATCHED = (WatchedShare(below=0.5, share=INTERVAL),)
LOW, HIGH = 0.1, 0.9
Start = Callable[..., DriftWatch]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a watch whose state is kept in a file."""

    def started(certificate: str = DIGEST, alpha: float = 0.01) -> DriftWatch:
        return DriftWatch(certificate, WATCHED, DriftRule(alpha=alpha), path=tmp_path / "s.json")

    return started


def queries(seed: int, count: int, share: float) -> NDArray[np.float64]:
    """Scores of 0.9, and of 0.1 for so many; the mark is at 0.5."""
    return np.where(np.random.default_rng(seed).random(count) < share, LOW, HIGH)


def delay(share: float, *, before: int, seed: int) -> float:
    """Queries from a shift to the alarm; infinite where none comes in 1,000, or one came before."""
    watch = DriftWatch(DIGEST, WATCHED)
    if watch.update(queries(seed, before, INTERVAL.value)):
        return np.inf
    watch.update(queries(seed + 1000, 1000, share))
    return np.inf if watch.alarm_at is None else watch.alarm_at - before


@pytest.mark.parametrize("share", [0.16, 0.2, 0.24])
def test_no_alarm_while_the_share_is_as_certified(share: float) -> None:
    raised = [DriftWatch(DIGEST, WATCHED).update(queries(n, 1500, share)) for n in range(60)]
    assert sum(raised) <= 3


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("before", [0, 500])
def test_a_shift_is_found_soon_however_late_it_comes(share: float, before: int) -> None:
    found = [delay(share, before=before, seed=seed) for seed in range(40)]
    assert np.median(found) <= 130


def audited(path: Path | None = None) -> DriftWatch:
    return DriftWatch(DIGEST, WATCHED, disagreement=Interval(0.05, 0.02, 0.1), path=path)


def test_audits_that_disagree_too_often_raise_it() -> None:
    watch = audited()
    assert not watch.update_audits([n % 12 == 0 for n in range(600)])
    assert watch.update_audits([n % 2 == 0 for n in range(100)])
    assert "audits the teacher disagreed with" in watch.finding
    assert "10.0% at most" in watch.finding
    assert watch.alarm_at == watch.seen == 0
    uncertified = DriftWatch(DIGEST, WATCHED)
    assert not uncertified.update_audits([True] * 500)


def test_audits_are_kept(tmp_path: Path) -> None:
    path, whole = tmp_path / "s.json", audited()
    for number in range(6):
        flags, scores = [number % 3 == 0] * 3, queries(number, 5, 0.2)
        for watch in (whole, audited(path)):
            watch.update(scores)
            watch.update_audits(flags)
            watch.close()
    assert audited(path).state == whole.state
    assert (whole.state.audited, whole.state.disagreed) == (18, 6)


def test_the_alarm_stays() -> None:
    watch = DriftWatch(DIGEST, WATCHED)
    assert watch.update([LOW] * 100)
    at, finding = watch.alarm_at, watch.finding
    assert watch.update([HIGH] * 1000)
    assert (watch.alarm_at, watch.finding) == (at, finding)
    assert f"of {at} queries 100.0% had a score below 0.5" in finding
    assert "certified 16.0% to 24.0%" in finding


@pytest.mark.parametrize("interval", [Interval(0.0, 0.0, 0.02), Interval(1.0, 0.9, 1.0)])
def test_one_side_can_be_open(interval: Interval) -> None:
    watched = (WatchedShare(below=0.5, share=interval),)
    usual, unusual = (LOW, HIGH) if interval.value else (HIGH, LOW)
    assert not DriftWatch(DIGEST, watched).update([usual] * 2000)
    assert DriftWatch(DIGEST, watched).update([unusual] * 100)


def test_a_score_that_is_nan_is_a_low_one() -> None:
    assert DriftWatch(DIGEST, WATCHED).update([float("nan")] * 100)


def test_any_of_several_marks_can_raise_it() -> None:
    marks = [(0.3, Interval(0.2, 0.1, 0.3)), (0.6, Interval(0.5, 0.4, 0.6))]
    watched = [WatchedShare(below=below, share=share) for below, share in marks]
    watch = DriftWatch(DIGEST, watched)
    rng = np.random.default_rng(0)
    assert watch.update(np.where(rng.random(300) < 0.2, 0.1, 0.4))  # half of 0.6 moved below
    assert "below 0.6" in watch.finding
    assert not DriftWatch(DIGEST, ()).update([0.0] * 100)


def test_goes_on_after_a_restart(start: Start) -> None:
    stream = queries(3, 300, 0.2)
    whole = DriftWatch(DIGEST, WATCHED)
    whole.update(stream)
    for part in np.split(stream, 10):
        watch = start()
        watch.update(part)
        watch.close()
    assert start().state == whole.state
    assert start().update([LOW] * 100)


def test_an_alarm_is_kept_at_once(start: Start) -> None:
    watch = start()
    assert watch.update([LOW] * 60)
    assert start().alarm_at == watch.alarm_at  # without `close`


def test_is_written_now_and_then(start: Start) -> None:
    watch = start()
    for number in range(25):
        watch.update(queries(number, 10, 0.2))
    watch.close()
    assert start().seen == 250


def test_processes_that_share_a_file_lose_nothing(start: Start) -> None:
    first, second = start(), start()
    first.update(queries(0, 30, 0.2))
    second.update(queries(1, 40, 0.2))
    first.save()
    second.save()
    assert second.seen == 70
    first.update([HIGH] * 5)
    first.close()
    assert start().seen == 75


def test_processes_that_share_a_file_share_an_alarm(start: Start) -> None:
    first, second = start(), start()
    assert first.update([LOW] * 60)
    second.update([HIGH])
    second.save()
    assert second.alarm_at == first.alarm_at


def test_evidence_of_one_process_counts_beside_that_of_the_other(start: Start) -> None:
    first, second = start(alpha=0.5), start(alpha=0.5)
    second.update([HIGH] * 6)
    second.save()
    first.update([LOW] * 3)  # hardly evidence, and behind six others it is none
    assert first.seen <= 9
    assert first.alarm_at is None


def test_many_threads_lose_no_query(start: Start) -> None:
    watch = start(alpha=WATCHED_ERROR + 1e-12)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(watch.update, [[HIGH, HIGH, LOW, HIGH, HIGH]] * 200))
    watch.close()
    assert start().seen == 1000


def test_what_cannot_be_written_is_said(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = start()
    watch.update([HIGH] * 10)
    (tmp_path / "s.json").mkdir()
    with caplog.at_level(logging.WARNING):
        watch.close()
    assert "what the drift watch saw is not kept" in caplog.text
    (tmp_path / "s.json").rmdir()
    watch.close()
    assert start().seen == 10


def test_what_can_never_be_written_is_said_once_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("no folder")
    watch = DriftWatch(DIGEST, WATCHED, path=blocked / "s.json")
    assert "cannot write" in caplog.text
    for number in range(200):
        watch.update(queries(number, 2, 0.2))
    watch.close()
    assert len(caplog.records) == 1
    assert watch.seen == 400


def test_goes_on_where_the_file_can_be_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("no folder")
    watch = DriftWatch(DIGEST, WATCHED, path=blocked / "s.json")
    watch.update(queries(0, 250, 0.2))
    blocked.unlink()
    watch.update(queries(1, 100, 0.2))
    watch.close()
    assert DriftWatch(DIGEST, WATCHED, path=blocked / "s.json").seen == 350
    assert len(caplog.records) == 1


def test_keeps_few_queries_for_a_file_that_cannot_be_written(start: Start, tmp_path: Path) -> None:
    watch, path = start(), tmp_path / "s.json"
    path.mkdir()
    for number in range(50):
        watch.update(queries(number, 100, 0.2))
    watch.close()
    path.rmdir()
    other = start()
    other.update(queries(99, 10, 0.2))
    other.close()
    watch.close()
    assert start().seen == 10 + 1000


def test_a_watch_that_saw_nothing_writes_no_state(start: Start, tmp_path: Path) -> None:
    start().close()
    assert not (tmp_path / "s.json").exists()


def test_what_cannot_be_read_is_not_called_damaged(start: Start, tmp_path: Path) -> None:
    (tmp_path / "s.json").mkdir()
    with pytest.raises(InputError, match="cannot read") as caught:
        start()
    assert "damaged" not in str(caught.value)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1, "seen": -1}'])
def test_damage_is_an_error_with_a_mend(start: Start, tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match="delete it to watch anew"):
        start()


def test_damaged_capital_is_refused(start: Start, tmp_path: Path) -> None:
    DriftState(certificate=DIGEST, seen=1, counts=(1,), capital=((1.0,), (1.0,))).save(
        tmp_path / "s.json"
    )
    with pytest.raises(InputError, match="is damaged"):
        start()


def test_the_state_of_another_certificate_is_refused(start: Start) -> None:
    watch = start()
    watch.update([HIGH])
    watch.close()
    with pytest.raises(InputError, match="of another certificate"):
        start("0" * 64)


def test_state_lies_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_STATE", str(tmp_path))
    assert default_state_path(DIGEST).is_relative_to(tmp_path)
    monkeypatch.delenv("EDGECLIP_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert default_state_path(DIGEST).is_relative_to(tmp_path / "xdg" / "edgeclip")


def test_rules_out_of_bounds_are_refused() -> None:
    for alpha in (0.0, WATCHED_ERROR, 1.0):
        with pytest.raises(ValueError, match="alpha"):
            DriftRule(alpha=alpha)
    with pytest.raises(ValueError, match="seen"):
        dataclasses.replace(DriftState(certificate=DIGEST), seen=-1)
