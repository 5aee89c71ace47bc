"""Numbers as a report prints them: few digits, always a unit."""

import math

from edgeclip.runtime.intervals import Interval

MISSING = "unavailable"


def percent(share: float) -> str:
    """A share as percent: 0.9213 is "92.1%"."""
    return f"{100 * share:.1f}%"


def percent_interval(value: Interval) -> str:
    """The bounds of a share's interval: "90.3 to 93.6%"."""
    return f"{100 * value.low:.1f} to {100 * value.high:.1f}%"


def digits(value: float) -> str:
    """Three significant digits, without an exponent: 0.0123, 1.23, 123, 12,346."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}"


def megabytes(count: float | None) -> str:
    """Bytes as MB of 10^6 bytes."""
    return MISSING if count is None else f"{digits(count / 1e6)} MB"


def seconds(value: float) -> str:
    """A duration a person can read: "0.42 s", "12.3 s", "3 min 05 s", "1 h 02 min"."""
    if value < 59.95:
        return f"{digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
