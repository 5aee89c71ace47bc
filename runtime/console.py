"""Terminal output: numbers with units, aligned columns, progress bars, text safe to show."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeclip.runtime.stats.interval import Interval

MISSING = "unavailable"


def percent(share: float) -> str:
    """Format a share as percent: 0.9213 is "92.1%"."""
    return f"{100 * share:.1f}%"


def percent_interval(value: "Interval") -> str:
    """Format the bounds of a share's interval: "90.3 to 93.6%", "at least 90.3%"."""
    if math.isfinite(value.low) and math.isfinite(value.high):
        return f"{100 * value.low:.1f} to {100 * value.high:.1f}%"
    return interval_ends(value, percent)


def interval_ends(value: "Interval", number: Callable[[float], str], to: str = " to ") -> str:
    """Format the ends of an interval: "1.22 to 1.31", "at least 1.22", "not known".

    A lower end of 0 without an upper one is that of a time of which nothing is known.
    """
    low, high = math.isfinite(value.low), math.isfinite(value.high)
    if low and high:
        return f"{number(value.low)}{to}{number(value.high)}"
    if low and value.low != 0:
        return f"at least {number(value.low)}"
    return f"at most {number(value.high)}" if high else "not known"


def digits(value: float) -> str:
    """Format with three significant digits and no exponent: 0.0123, 1.23, 123, 12,346."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}"


def megabytes(count: float | None) -> str:
    """Format bytes as MB of 10^6 bytes."""
    return MISSING if count is None else f"{digits(count / 1e6)} MB"


def seconds(value: float) -> str:
    """Format a duration: "0.42 s", "12.3 s", "3 min 05 s", "1 h 02 min"."""
    if value < 59.95:
        return f"{digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format a table: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


Progress = Callable[[int, int], None]  # called after each step with (steps done, total steps)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Draw a progress bar on stderr, if it is a terminal; yields the function that advances it."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield step


def plain_text(value: str) -> str:
    """One line without control characters or halves of surrogate pairs, safe to print."""
    whole = value.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in whole).split())


# Control characters but TAB and newline, line separators that are none to a terminal, marks that
# change the direction of what follows, and halves of surrogate pairs (bytes of a file name that
# is not UTF-8).
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    r"""Escape what would act on a terminal instead of being shown, as Python does: `\x1b`."""
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    r"""Escape line breaks too, which a file name may hold: `\n`."""
    return escape_controls(text).replace("\n", "\\n")


class EscapedOutput:
    """A text stream on which everything can be printed.

    What would act on a terminal (`escape_controls`) and what the encoding of the stream does not
    have, as an emoji in cp1252, is escaped. All else is as the stream does it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; returns its length."""
        encoding = self._stream.encoding or "utf-8"
        shown = escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(shown)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
