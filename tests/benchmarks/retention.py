"""What the student keeps of the teacher, and what it costs: the demo, held to its bars.

`--quick` measures the bundle that is kept in the repository, without training one.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from _bars import Bar, command, finish, options

from edgeclip.export.demo.demo import DemoSettings, run_demo
from edgeclip.export.demo.summary import DemoSummary


def bars(summary: DemoSummary, *, quick: bool) -> list[Bar]:
    """The bars of the road from teacher to device."""
    intervals = summary.intervals
    teacher = [
        Bar(
            name=name,
            value=intervals[name].value,
            direction=">=",
            bound=0.8,
            interval=intervals[name],
        )
        for name in ("teacher_image_to_text_r1", "teacher_text_to_image_r1")
    ]
    student = [
        Bar(
            name="retention",
            value=summary.retention,
            direction=">=",
            bound=summary.retention_bar,
            interval=intervals["retention"],
        ),
        Bar(
            name="latency_ratio",
            value=summary.latency_ratio,
            direction="<=",
            bound=summary.latency_bar,
            interval=intervals["latency_ratio"],
        ),
    ]
    if summary.student_int8_r1 is not None:
        loss = 100 * (summary.student_fp32_r1 - summary.student_int8_r1)
        student.append(
            Bar(name="int8_r1_loss", value=loss, direction="<=", bound=1.0, unit="points")
        )
    if not quick:
        minutes = sum(summary.seconds.values()) / 60
        student.append(
            Bar(name="demo_time", value=minutes, direction="<=", bound=8.0, unit="minutes")
        )
    return teacher + student


def main() -> int:
    """Run the demo in a temporary directory."""
    args = options(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = DemoSettings(quick=args.quick)
        summary = run_demo(settings, Path(folder), command=command())
    return finish(bars(summary, quick=args.quick), args.out, summary=asdict(summary))


if __name__ == "__main__":
    sys.exit(main())
