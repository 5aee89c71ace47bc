"""What the student keeps of the teacher, and what it costs: the demo, held to its bars.

`--quick` measures the bundle that is kept in the repository, without training one.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _bars import Bar, Rule, command, finish, hold, options

from edgeclip.export.demo.demo import DemoSettings, run_demo
from edgeclip.export.demo.summary import DemoSummary

BARS: dict[str, Rule] = {
    "teacher_image_to_text_r1": (">=", 0.8, ""),
    "teacher_text_to_image_r1": (">=", 0.8, ""),
    "retention": (">=", None, ""),  # as the demo's summary says
    "latency_ratio": ("<=", None, ""),
    "int8_r1_loss": ("<=", 1.0, "points"),
    "demo_time": ("<=", 8.0, "minutes"),
}
KEPT_MODELS = ("compress/emoji_teacher",)


def bars(summary: DemoSummary, *, quick: bool) -> Iterator[Bar]:
    found = summary.intervals
    for name in ("teacher_image_to_text_r1", "teacher_text_to_image_r1"):
        yield hold(BARS, name, found[name])
    yield hold(BARS, "retention", found["retention"], summary.retention_bar)
    yield hold(BARS, "latency_ratio", found["latency_ratio"], summary.latency_bar)
    if summary.student_int8_r1 is not None:
        loss = 100 * (summary.student_fp32_r1 - summary.student_int8_r1)
        yield hold(BARS, "int8_r1_loss", loss)
    if not quick:
        yield hold(BARS, "demo_time", sum(summary.seconds.values()) / 60)


def main() -> int:
    args = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = run_demo(DemoSettings(quick=args.quick), Path(folder), command=command())
    return finish([*bars(summary, quick=args.quick)], args.out, summary=summary)


if __name__ == "__main__":
    sys.exit(main())
