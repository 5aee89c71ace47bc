"""Split plans for people: a text table, the reasons for the choice, a chart and a page."""

from collections.abc import Sequence

from edgeclip.profiles.report.charts import StackBar, StackChart
from edgeclip.profiles.report.drawing import Colour
from edgeclip.profiles.report.sections import (
    Cell,
    Figure,
    Note,
    Page,
    PageSummary,
    Table,
    columns,
    section_of,
    sections,
)
from edgeclip.runtime.console import columns as text_columns
from edgeclip.runtime.console import digits, percent
from edgeclip.runtime.planning.choose_plan import Objective, PlanChoice
from edgeclip.runtime.planning.estimate import PERCENTILE, PlanEstimate

_HEADER = (
    *("", "plan", "p50 ms", "p95 ms", "bytes", "cosine", "least"),
    *("device", "encode", "up", "rtt", "queue", "decode", "server", "down"),
)


def plan_table(choice: PlanChoice, *, all_codecs: bool = False) -> str:
    """One line for each plan, the cheapest first: times, bytes, cosines, and the parts' means.

    Args:
        choice: what was chosen among which.
        all_codecs: also those that send the same as another plan in a dearer codec.
    """
    shown = choice.allowed if all_codecs else choice.best_of_each()
    lines = [text_columns([_HEADER, *(_row(item, choice) for item in shown)], left=2)]
    left_out = len(choice.allowed) - len(shown)
    if left_out:
        lines.append(f"Each in its best codec; {left_out} more with --all.")
    if choice.refused:
        names = "; ".join(f"{item.plan.name} ({item.cosine_least:.3f})" for item in choice.refused)
        lines.append(f"Not exact enough, with their least cosine: {names}.")
    return "\n".join(lines)


def _row(item: PlanEstimate, choice: PlanChoice) -> tuple[str, ...]:
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


def explain(choice: PlanChoice, objective: Objective) -> str:
    """A few sentences: what was chosen, by how much, and why no cut in the middle was."""
    lines = [_headline(choice, objective)]
    if choice.best.plan.kind != "cut" or choice.best.plan.cut == 0:
        lines += _why_no_cut(choice, objective)
    if choice.refused:
        first = choice.refused[0]
        if objective.cost(first) < objective.cost(choice.best):
            lines.append(
                f"{len(choice.refused)} plans are out for what their codec costs; the cheapest of "
                f"them is {_quoted(first)} with a least cosine of {first.cosine_least:.4f}."
            )
    fewest = min((choice.best, *choice.allowed), key=lambda item: item.p95_level)
    if fewest.p95_level < PERCENTILE:
        lines.append(
            f"Too few for a 95th percentile: {fewest.samples} measured rounds, of which the "
            f"slowest is kept in {percent(fewest.p95_level)} of cases; p95 stands for that. "
            "Measure at least 19."
        )
    if objective.ms_per_joule and choice.best.joules is None:
        lines.append("Energy was not measured, so it is left out of the choice.")
    return "\n".join(lines)


def _headline(choice: PlanChoice, objective: Objective) -> str:
    best = choice.best
    start = f"Chosen: {best.plan.name}, p95 {digits(best.p95_ms)} ms."
    if not choice.meets_deadline:
        return (
            f"{start} No plan keeps the deadline of {objective.deadline_ms:g} ms in 95% of cases; "
            "this one comes nearest."
        )
    others = [item for item in choice.allowed if item is not best]
    if not others:
        return start
    following = others[0]
    gain = objective.cost(following) - objective.cost(best)
    share = percent(gain / objective.cost(following)) if objective.cost(following) > 0 else "0%"
    return f"{start} The next one, {following.plan.name}, costs {digits(gain)} ms ({share}) more."


def _why_no_cut(choice: PlanChoice, objective: Objective) -> list[str]:
    middle = [item for item in choice.allowed if item.plan.kind == "cut" and item.plan.cut]
    if not middle:
        return []
    best = min(middle, key=objective.cost)
    lost = objective.cost(best) - objective.cost(choice.best)
    lines = [
        f"No cut in the middle wins: the best, {best.plan.name}, costs {digits(lost)} ms more."
    ]
    pictures = [item for item in choice.allowed if item.plan.kind == "image"]
    if pictures:
        picture = min(pictures, key=_bytes)
        wide = [item for item in middle if _bytes(item) > _bytes(picture)]
        narrow = [item for item in middle if _bytes(item) <= _bytes(picture)]
        lines += _wide(wide, picture) + _narrow(narrow, choice, objective)
    return lines


def _wide(middle: Sequence[PlanEstimate], picture: PlanEstimate) -> list[str]:
    if not middle:
        return []
    smallest = min(middle, key=_bytes)
    where = sorted({item.plan.cut for item in middle if item.plan.cut is not None})
    cuts = f"cut {where[0]}" if len(where) == 1 else f"cuts {where[0]} to {where[-1]}"
    return [
        f"At {cuts} at least {_bytes(smallest):,} bytes cross ({smallest.plan.codec}), but the "
        f"picture itself takes {_bytes(picture):,} ({picture.plan.codec}): a tower of constant "
        "width carries as many values through every block, and compressed pictures are smaller."
    ]


def _narrow(middle: Sequence[PlanEstimate], choice: PlanChoice, objective: Objective) -> list[str]:
    if not middle:
        return []
    best = min(middle, key=objective.cost)
    (alone,) = (item for item in choice.allowed if item.plan.kind == "device")
    spared = alone.parts.device - best.parts.device
    network = best.parts.up + best.parts.rtt + best.parts.down
    return [
        f"Fewer bytes cross at {best.plan.name} ({_bytes(best):,}), but so late that it spares the "
        f"device {digits(max(0.0, spared))} of {digits(alone.parts.device)} ms, for "
        f"{digits(network)} ms on the network."
    ]


def _bytes(item: PlanEstimate) -> int:
    return item.bytes_p50


def _quoted(item: PlanEstimate) -> str:
    return f"{item.plan.name!r}"


# Each part with its colour and strength: blue works on the device, orange on the network, green
# on the server.
_PARTS: dict[str, tuple[str, Colour, float]] = {
    "device": ("on the device", "blue", 0.9),
    "encode": ("encode", "blue", 0.45),
    "up": ("bytes up", "bar", 0.9),
    "rtt": ("round trip", "bar", 0.45),
    "queue": ("wait for the server", "grey", 0.5),
    "decode": ("decode", "green", 0.4),
    "server": ("on the server", "green", 0.8),
    "down": ("bytes down", "purple", 0.6),
}


def plan_chart(choice: PlanChoice, *, title: str, deadline_ms: float | None = None) -> StackChart:
    """The plans, each in its best codec, as bars of their parts' means; marks are p95.

    Args:
        choice: what was chosen among which.
        title: what it is about, such as the link.
        deadline_ms: drawn as a dashed line.
    """
    return StackChart(
        title=title,
        bars=tuple(
            StackBar(
                label=item.plan.name,
                parts=tuple(
                    (name, value)
                    for part, (name, _, _) in _PARTS.items()
                    if (value := float(getattr(item.parts, part))) > 0
                ),
                figure=f"{digits(item.p95_ms)} ms",
                mark=item.p95_ms,
                chosen=item is choice.best,
            )
            for item in choice.best_of_each()
        ),
        axis_name="milliseconds",
        names=tuple(name for name, _, _ in _PARTS.values()),
        colours={name: (colour, strong) for name, colour, strong in _PARTS.values()},
        legend=True,
        mark_name="95th percentile",
        limit=None if deadline_ms is None else (deadline_ms, f"deadline {deadline_ms:g} ms"),
    )


def plan_page(chart: StackChart, choice: PlanChoice, *, words: str) -> Page:
    """The picture, the same in numbers, and the words that go with them."""
    rows = tuple(
        tuple(Cell(text) for text in _row(item, choice)[1:]) for item in choice.best_of_each()
    )
    lines = words.splitlines()
    caption = (
        "Each plan in its best codec. A bar is as long as the mean time, its parts as their "
        "means; a mark is the 95th percentile."
    )
    return Page(
        title=chart.title,
        lead=(),
        summary=PageSummary(lines[0], "pass" if choice.meets_deadline else "miss"),
        sections=sections(
            section_of("plans", "What each plan takes", [Figure(chart, caption)]),
            section_of("choice", "Why", [Note(line) for line in lines[1:]]),
            section_of(
                "numbers",
                "In numbers",
                [Table(name="Plans, times in ms", columns=columns(*_HEADER[1:]), rows=rows)],
            ),
        ),
    )
