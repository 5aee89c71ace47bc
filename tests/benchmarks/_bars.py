"""What every benchmark shares: its options, its JSON file, its last lines, its exit status."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.quality.intervals import Interval

EMOJI_BUNDLE = Path(__file__).parents[2] / "export" / "emoji_bundle"  # the built-in student's


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bound that a measured value must meet.

    Attributes:
        interval: of 95%, where one was computed; the lowest and the highest of a few runs in
            `server.py`.
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


def options(description: str) -> argparse.ArgumentParser:
    """`--quick` and `--out`, as every benchmark has them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser


def command() -> str:
    """What was typed, for the record."""
    return shlex.join(["python", *sys.argv])


def finish(bars: Sequence[Bar], out: Path | None, **found: Any) -> int:
    """Write the JSON file, `found` in it; print a line a bar; the exit status, 1 for a miss."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": command(),
            "machine": asdict(detect_machine()),
            **found,
            "bars": [asdict(bar) | {"passed": bar.passed} for bar in bars],
        }
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print()
    for bar in bars:
        print(bar.line())
    return 0 if all(bar.passed for bar in bars) else 1
