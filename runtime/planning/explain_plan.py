"""Why a plan was chosen, in words and with the numbers that decide."""

from collections.abc import Sequence

from edgeclip.runtime.planning.estimate import Estimate
from edgeclip.runtime.planning.planner import Choice, Objective
from edgeclip.runtime.reporting.report_format import digits, percent


def explain(choice: Choice, objective: Objective) -> str:
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


def _headline(choice: Choice, objective: Objective) -> str:
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


def _why_no_cut(choice: Choice, objective: Objective) -> list[str]:
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


def _wide(middle: Sequence[Estimate], picture: Estimate) -> list[str]:
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


def _narrow(middle: Sequence[Estimate], choice: Choice, objective: Objective) -> list[str]:
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


def _bytes(item: Estimate) -> int:
    return item.bytes_p50


def _quoted(item: Estimate) -> str:
    return f"{item.plan.name!r}"
