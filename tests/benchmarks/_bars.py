"""What every benchmark shares: its options, its JSON file, its last lines, its exit status."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.stats.interval import Interval

ROOT = Path(__file__).parents[2]
EMOJI_BUNDLE = ROOT / "export" / "emoji_bundle"  # the built-in student's
sys.path.append(str(ROOT))  # for `tests`, which is not installed


@dataclass(frozen=True, slots=True)
class Bar:
    """A bound that a measured value must meet; its interval is that of 95%.

    In `server.py` it is from the lowest to the highest of a few runs.
    """

    name: str
    value: float
    direction: Literal[">=", "<="]
    bound: float
    unit: str = ""
    interval: Interval | None = None

    @property
    def passed(self) -> bool:
        """Whether the value itself meets the bound."""
        above = self.value >= self.bound
        return bool(above if self.direction == ">=" else self.value <= self.bound)

    def line(self) -> str:
        """`BAR name: value unit (bar >= x) pass`."""
        unit = f" {self.unit}" if self.unit else ""
        verdict = "pass" if self.passed else "miss"
        bound = f"(bar {self.direction} {self.bound:g})"
        return f"BAR {self.name}: {self.value:.4g}{unit} {bound} {verdict}"


def at_least(name: str, value: float | Interval, bound: float, unit: str = "") -> Bar:
    """A bar of a least value; of an interval the value counts, not its ends."""
    if isinstance(value, Interval):
        return Bar(name, value.value, ">=", bound, unit, value)
    return Bar(name, value, ">=", bound, unit)


def at_most(name: str, value: float | Interval, bound: float, unit: str = "") -> Bar:
    """A bar of a largest value, likewise."""
    return replace(at_least(name, value, bound, unit), direction="<=")


def span(item: Interval, digits: int = 3) -> str:
    """`value [low, high]`."""
    return f"{item.value:.{digits}f} [{item.low:.{digits}f}, {item.high:.{digits}f}]"


def say(line: str) -> None:
    """Tell on stderr what is going on."""
    print(line, file=sys.stderr, flush=True)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser


def command() -> str:
    return shlex.join(["python", *sys.argv])


def finish(bars: Sequence[Bar], out: Path | None, **found: Any) -> int:
    """Write the JSON file, `found` in it; print a line a bar; the exit status, 1 for a miss."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": command(),
            "machine": detect_machine(),
            **found,
            "bars": [asdict(bar) | {"passed": bar.passed} for bar in bars],
        }
        out.write_text(json.dumps(record, indent=2, default=asdict) + "\n", encoding="utf-8")
    print()
    for bar in bars:
        print(bar.line())
    return 0 if all(bar.passed for bar in bars) else 1
