"""Plans as text and as a picture: a table, the reasons of the choice, stacked bars."""

from collections.abc import Sequence
from html import escape

from edgeclip.profiles.report.report_charts import (
    Axis,
    line,
    linear_ticks,
    text,
    text_width,
    tick_name,
)
from edgeclip.runtime.console import columns, digits, percent
from edgeclip.runtime.planning.estimate import PlanEstimate
from edgeclip.runtime.planning.planner import Objective, PlanChoice

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
    lines = [columns([_HEADER, *(_row(item, choice) for item in shown)], left=2)]
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


# Each part with its colour (Okabe and Ito's palette, told apart by colour-blind people too):
# blues work on the device, oranges on the network, greens on the server.
_PARTS = (
    ("device", "on the device", "#0072b2"),
    ("encode", "encode", "#56b4e9"),
    ("up", "bytes up", "#d55e00"),
    ("rtt", "round trip", "#e69f00"),
    ("queue", "wait for the server", "#999999"),
    ("decode", "decode", "#7ed9c0"),
    ("server", "on the server", "#009e73"),
    ("down", "bytes down", "#cc79a7"),
)
_WIDTH, _ROW, _BAR = 980, 30, 16
_TEXT = 13
_STYLE = """
svg { background: #ffffff; font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
text { fill: #3d454f; paint-order: stroke; stroke: #ffffff; stroke-width: 3px; }
.strong { fill: #1a1d21; font-weight: 600; }
.title { font-size: 16px; }
.axis { stroke: #59616d; }
.grid { stroke: #d8dce2; }
.p95 { stroke: #1a1d21; stroke-width: 2; }
.whisker { stroke: #1a1d21; stroke-width: 1; }
.deadline { stroke: #b34a00; stroke-width: 1.5; stroke-dasharray: 5 4; }
"""


def plan_picture(choice: PlanChoice, *, title: str, deadline_ms: float | None = None) -> str:
    """Draw the plans, each in its best codec, as SVG that stands by itself.

    A bar is as long as the mean time, its parts as their means; a black mark is the 95th
    percentile.

    Args:
        choice: what was chosen among which.
        title: what it is about, such as the link.
        deadline_ms: drawn as a dashed line.
    """
    shown = choice.best_of_each()
    left = 40 + max(text_width(item.plan.name, _TEXT) for item in shown)
    top, right = 100, _WIDTH - 110
    bottom = top + _ROW * len(shown)
    longest = max(*(item.p95_ms for item in shown), *(item.parts.total for item in shown))
    x = Axis(low=0.0, high=max(longest, 1e-3) * 1.02, start=left, end=right)
    parts = [text(12, 26, title, css="strong title"), *_legend(shown), *_grid(x, top, bottom)]
    if deadline_ms is not None and deadline_ms <= x.high:
        at = x.at(deadline_ms)
        parts += [
            line(at, top - 6, at, bottom, "deadline"),
            text(at, top - 10, f"deadline {deadline_ms:g} ms", anchor="middle"),
        ]
    for number, item in enumerate(shown):
        parts += _bar(item, x, top + _ROW * number, chosen=item is choice.best)
    return _document(parts, bottom + 50, title)


def plan_page(picture: str, *, title: str, words: str) -> str:
    """An HTML page with the picture and the words that go with it."""
    paragraphs = "".join(f"<p>{escape(part)}</p>" for part in words.splitlines())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>body{{font:16px/1.5 system-ui,sans-serif;"
        "max-width:1000px;margin:32px auto;padding:0 16px;color:#1a1d21;background:#fff}"
        "svg{max-width:100%;height:auto}</style></head><body>"
        f"{picture}{paragraphs}</body></html>\n"
    )


def _legend(shown: Sequence[PlanEstimate]) -> list[str]:
    """The parts that occur, in two rows if need be, and the mark."""
    parts: list[str] = []
    at, row = 12.0, 48.0
    for name, label, colour in _PARTS:
        if not any(getattr(item.parts, name) > 0 for item in shown):
            continue
        width = 32 + text_width(label, _TEXT)
        if at + width > _WIDTH - 12:
            at, row = 12.0, row + 20
        parts += [_box(at, row - 10, 12, 12, colour), text(at + 18, row, label)]
        at += width
    if at + 180 > _WIDTH - 12:
        at, row = 12.0, row + 20
    parts += [line(at + 6, row - 11, at + 6, row + 3, "p95"), text(at + 18, row, "95th percentile")]
    return parts


def _grid(x: Axis, top: float, bottom: float) -> list[str]:
    parts = []
    for value in linear_ticks(x.low, x.high, 7):
        at = x.at(value)
        parts += [
            line(at, top - 4, at, bottom, "grid"),
            text(at, bottom + 18, tick_name(value), anchor="middle"),
        ]
    middle = (x.start + x.end) / 2
    return [
        *parts,
        line(x.start, bottom, x.end, bottom, "axis"),
        text(middle, bottom + 38, "milliseconds", anchor="middle"),
    ]


def _bar(item: PlanEstimate, x: Axis, top: float, *, chosen: bool) -> list[str]:
    base = top + _ROW / 2
    name = f"▸ {item.plan.name}" if chosen else item.plan.name
    parts = [text(x.start - 10, base + 5, name, css="strong" if chosen else "", anchor="end")]
    at = 0.0
    for key, label, colour in _PARTS:
        value = float(getattr(item.parts, key))
        if value > 0:
            width = x.at(at + value) - x.at(at)
            tip = f"{label}: {digits(value)} ms"
            parts.append(_box(x.at(at), base - _BAR / 2, width, _BAR, colour, tip))
            at += value
    mark = x.at(item.p95_ms)
    end = max(mark, x.at(item.parts.total))
    return [
        *parts,
        line(min(x.at(at), mark), base, mark, base, "whisker"),
        line(mark, base - 11, mark, base + 11, "p95"),
        text(end + 8, base + 5, f"{digits(item.p95_ms)} ms", css="strong" if chosen else ""),
    ]


def _box(x: float, y: float, width: float, height: float, colour: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.3):.1f}" height="{height:.1f}" '
        f'fill="{colour}">{title}</rect>'
    )


def _document(parts: Sequence[str], height: float, label: str) -> str:
    size = f'width="{_WIDTH}" height="{height:.0f}" viewBox="0 0 {_WIDTH} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )
