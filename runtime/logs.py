"""Log messages on stderr, as plain lines for people or as JSON lines for programs.

Every module logs through `logging.getLogger(__name__)`; the commands configure it here. Programs
that use EdgeCLIP as a library configure logging themselves.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from edgeclip.runtime.console import escape_controls

_ROOT = "edgeclip"
_LEVELS = {
    name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
}


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`, above any progress bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # bars need it imported
            if tqdm is None:
                sys.stderr.write(line + "\n")
            else:
                tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _PlainFormatter(logging.Formatter):
    """The bare message; EdgeCLIP's own warnings and errors begin with "edgeclip:"."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = ""
        if record.levelno <= logging.DEBUG:
            prefix = f"{record.name}: "
        elif _is_own(record) and record.levelno >= logging.ERROR:
            prefix = "edgeclip: error: "
        elif _is_own(record) and record.levelno >= logging.WARNING:
            prefix = "edgeclip: "
        return prefix + escape_controls(super().format(record))


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, and any exception."""

    def format(self, record: logging.LogRecord) -> str:
        created = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "time": created.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _is_own(record: logging.LogRecord) -> bool:
    return record.name == _ROOT or record.name.startswith(f"{_ROOT}.")


@contextmanager
def log_to_stderr(*, verbose: bool = False, as_json: bool = False) -> Iterator[Callable[..., None]]:
    """Log to stderr until the block ends; yields a function to change the options.

    EdgeCLIP's messages are shown from INFO on, other libraries' from WARNING on.

    Args:
        verbose: show EdgeCLIP's DEBUG messages too.
        as_json: write JSON lines, Python's warnings included.
    """
    handler = _StderrHandler()
    handler.addFilter(lambda record: _is_own(record) or record.levelno >= logging.WARNING)
    own = logging.getLogger(_ROOT)
    level_before = own.level

    def configure(*, verbose: bool = False, as_json: bool = False) -> None:
        own.setLevel(logging.DEBUG if verbose else logging.INFO)
        handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
        logging.captureWarnings(as_json)

    configure(verbose=verbose, as_json=as_json)
    logging.getLogger().addHandler(handler)
    try:
        yield configure
    finally:
        logging.getLogger().removeHandler(handler)
        own.setLevel(level_before)
        logging.captureWarnings(False)


def log_json_line(line: str) -> bool:
    """Log a line that `log_to_stderr(as_json=True)` wrote in another process.

    Returns whether it was such a line, of EdgeCLIP's own.
    """
    try:
        entry = json.loads(line)
        logger, level = str(entry["logger"]), _LEVELS[entry["level"]]
        message = str(entry["message"])
    except (ValueError, KeyError, TypeError):
        return False
    if logger != _ROOT and not logger.startswith(f"{_ROOT}."):
        return False
    logging.getLogger(logger).log(level, "%s", message)
    return True
