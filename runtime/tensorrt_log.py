"""What TensorRT says while it works: its messages collected, its phases as progress bars."""

import sys
import threading
from typing import Any, Protocol

_MOST_MESSAGES = 8
_LONGEST_MESSAGE = 500
_DEEPEST_BAR = 3  # TensorRT nests deeper, but those phases pass too fast to read


class MessageLog:
    """Collects errors and warnings; `logger` is TensorRT's `ILogger`.

    Args:
        trt: the TensorRT module.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.logger = _make_logger(trt, self)

    def clear(self) -> None:
        """Forget what was said so far."""
        self.errors.clear()
        self.warnings.clear()

    def summary(self) -> str:
        """The errors in one line, or the warnings where there was no error."""
        messages = self.errors or self.warnings
        shown = messages[:_MOST_MESSAGES]
        more = len(messages) - len(shown)
        return "; ".join(shown + ([f"and {more} more"] if more else [])) or "it gives no reason"


def _make_logger(trt: Any, log: MessageLog) -> Any:
    severities = trt.ILogger.Severity
    lists = {
        severities.INTERNAL_ERROR: log.errors,
        severities.ERROR: log.errors,
        severities.WARNING: log.warnings,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())[:_LONGEST_MESSAGE]
            known = lists.get(severity)
            if known is not None and line not in known:
                known.append(line)

    return Logger()


class PhaseSink(Protocol):
    """Told of the phases of a build, which nest. Called by one thread at a time."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside `parent` if there is one."""
        ...

    def step(self, phase: str, done: int) -> None:
        """So many of its steps are done."""
        ...

    def finish(self, phase: str) -> None:
        """It has ended."""
        ...


class PhaseBars:
    """Nested progress bars on stderr; nothing is drawn where stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bars: dict[str, Any] = {}
        self._depths: dict[str, int] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        from tqdm import tqdm

        depth = self._depths.get(parent, 0) + 1 if parent else 0
        self._depths[phase] = depth
        if depth >= _DEEPEST_BAR:
            return
        title = self._title if depth == 0 else "  " * depth + phase
        self._bars[phase] = tqdm(
            desc=title, total=steps, position=depth, leave=False, disable=not sys.stderr.isatty()
        )

    def step(self, phase: str, done: int) -> None:
        """So many of its steps are done."""
        bar = self._bars.get(phase)
        if bar is not None:
            bar.update(done - bar.n)

    def finish(self, phase: str) -> None:
        """A phase has ended."""
        self._depths.pop(phase, None)
        bar = self._bars.pop(phase, None)
        if bar is not None:
            bar.close()

    def close(self) -> None:
        """Take away the bars of phases that never finished."""
        for phase in list(self._bars):
            self.finish(phase)


def make_monitor(trt: Any, sink: PhaseSink, cancel: threading.Event) -> Any:
    """TensorRT's `IProgressMonitor`, which tells `sink` and ends the build once `cancel` is set.

    TensorRT calls it from C++, where an exception would end the process: once the sink
    has raised it is told nothing more, and only the display suffers.
    """
    lock = threading.Lock()  # TensorRT calls from several threads
    broken = threading.Event()

    def tell(method: Any, *arguments: Any) -> None:
        with lock:
            if broken.is_set():
                return
            try:
                method(*arguments)
            except Exception:
                broken.set()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(sink.start, phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            tell(sink.finish, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(sink.step, phase_name, step + 1)
            return not cancel.is_set()

    return Monitor()
