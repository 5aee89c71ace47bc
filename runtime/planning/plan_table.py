"""All plans as a table for a terminal."""

from edgeclip.runtime.planning.estimate import Estimate
from edgeclip.runtime.planning.planner import Choice
from edgeclip.runtime.reporting.report_format import digits
from edgeclip.runtime.text_columns import columns

_HEADER = (
    *("", "plan", "p50 ms", "p95 ms", "bytes", "cosine", "least"),
    *("device", "encode", "up", "rtt", "queue", "decode", "server", "down"),
)


def plan_table(choice: Choice, *, all_codecs: bool = False) -> str:
    """One line for each plan, the cheapest first: times, bytes, cosines, and the parts' means.

    Args:
        choice: what was chosen among which.
        all_codecs: also those that send the same as another plan in a dearer codec.
    """
    shown = choice.allowed if all_codecs else choice.best_of_each()
    lines = [columns([_HEADER, *(_row(item, choice) for item in shown)], left=2)]
    left_out = len(choice.allowed) - len(shown)
    if left_out:
        lines.append(f"Each in its best codec; {left_out} more with --all.")
    if choice.refused:
        names = "; ".join(f"{item.plan.name} ({item.cosine_least:.3f})" for item in choice.refused)
        lines.append(f"Not exact enough, with their least cosine: {names}.")
    return "\n".join(lines)


def _row(item: Estimate, choice: Choice) -> tuple[str, ...]:
    parts = item.parts
    values = (
        *(parts.device, parts.encode, parts.up, parts.rtt),
        *(parts.queue, parts.decode, parts.server, parts.down),
    )
    return (
        ">" if item is choice.best else "",
        item.plan.name,
        digits(item.plan.p50_ms or 0.0),
        digits(item.p95_ms),
        f"{item.bytes_p50:,}",
        f"{item.cosine_mean:.4f}",
        f"{item.cosine_least:.4f}",
        *("-" if value == 0 else digits(value) for value in values),
    )
