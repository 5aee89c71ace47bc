import sys
import threading

import pytest

from edgeclip.runtime.engines.tensorrt_library import (
    MessageLog,
    PhaseBars,
    TensorRtLibrary,
    make_monitor,
)


def test_messages_are_kept_by_severity(rtx: TensorRtLibrary) -> None:
    log = MessageLog(rtx.module)
    severity = rtx.module.ILogger.Severity
    assert log.summary() == "it gives no reason"
    log.logger.log(severity.INFO, "nothing to see")
    log.logger.log(severity.WARNING, "odd\n  shapes")
    assert log.summary() == "odd shapes"
    for _ in range(2):
        log.logger.log(severity.ERROR, "out of memory")
    log.logger.log(severity.INTERNAL_ERROR, "x" * 1000)
    assert log.summary() == "out of memory; " + "x" * 500
    log.clear()
    assert log.summary() == "it gives no reason"


def test_many_messages_are_cut_short(rtx: TensorRtLibrary) -> None:
    log = MessageLog(rtx.module)
    for number in range(20):
        log.logger.log(rtx.module.ILogger.Severity.ERROR, f"fault {number}")
    assert log.summary().endswith("fault 7; and 12 more")


def test_bars_nest_and_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bars = PhaseBars("building it")
    bars.start("all", None, 2)
    bars.start("parts", "all", 4)
    for done in (1, 4):
        bars.step("parts", done)
    bars.finish("parts")
    bars.start("never finished", "all", 3)
    bars.close()
    bars.step("never finished", 2)  # TensorRT may speak of it once more
    text = capsys.readouterr().err
    assert "building it:   0%" in text
    assert "  parts: " in text
    assert not bars._bars


def test_nothing_is_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = PhaseBars("building it")
    bars.start("all", None, 2)
    bars.close()
    assert capsys.readouterr().err == ""


class Recorder:
    """Writes down what it is told; raises at a step past `most`."""

    def __init__(self, most: int = 100) -> None:
        self.told: list[tuple[object, ...]] = []
        self._most = most

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.told.append(("start", phase, parent, steps))

    def step(self, phase: str, done: int) -> None:
        if done > self._most:
            raise ValueError("the display broke")
        self.told.append(("step", phase, done))

    def finish(self, phase: str) -> None:
        self.told.append(("finish", phase))


def test_monitor_passes_phases_on_and_cancels(rtx: TensorRtLibrary) -> None:
    recorder, cancel = Recorder(), threading.Event()
    monitor = make_monitor(rtx.module, recorder, cancel)
    monitor.phase_start("all", None, 2)
    assert monitor.step_complete("all", 0)
    cancel.set()
    assert not monitor.step_complete("all", 1)
    monitor.phase_finish("all")
    assert recorder.told == [
        ("start", "all", None, 2),
        ("step", "all", 1),
        ("step", "all", 2),
        ("finish", "all"),
    ]


def test_broken_display_does_not_reach_tensorrt(rtx: TensorRtLibrary) -> None:
    recorder = Recorder(most=0)
    monitor = make_monitor(rtx.module, recorder, threading.Event())
    assert monitor.step_complete("all", 0)
    monitor.phase_finish("all")
    assert recorder.told == []
