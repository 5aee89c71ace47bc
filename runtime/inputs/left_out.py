"""Keep account of what was given and not used, and tell it in one line when a command ends."""

import logging
from collections.abc import Sequence
from pathlib import Path

from edgeclip.runtime.console import plain_text
from edgeclip.runtime.errors import InputError

_log = logging.getLogger(__name__)
_NAMED = 5  # files that the line names for each reason; `-v` names all
# By path, since several sources may open the same folder in one command.
_noted: dict[Path, str] = {}


def leave_out(items: Sequence[tuple[Path, str]], *, strict: bool = False) -> None:
    """Note files, each with the reason why it is not used.

    Raises:
        InputError: with `strict`, if there are any.
    """
    if items and strict:
        raise InputError(f"{_describe(items)}; without --strict they are left out")
    for path, reason in items:
        _log.debug("left out: %s (%s)", plain_text(str(path)), reason)
    _noted.update(items)


def forget_left_out() -> None:
    """Begin a new account."""
    _noted.clear()


def report_left_out() -> None:
    """Log one line about all that was noted, if anything was, and forget it."""
    items = list(_noted.items())
    forget_left_out()
    if items:
        _log.warning("left out %s", _describe(items))


def _describe(items: Sequence[tuple[Path, str]]) -> str:
    by_reason: dict[str, list[Path]] = {}
    for path, reason in items:
        by_reason.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in by_reason.items():
        more = len(paths) - _NAMED
        names = ", ".join(plain_text(str(path)) for path in paths[:_NAMED])
        names += f" and {more} more (-v names all)" if more > 0 else ""
        parts.append(f"{reason}: {names}")
    count = "1 file" if len(items) == 1 else f"{len(items)} files"
    return f"{count}: {'; '.join(parts)}"
