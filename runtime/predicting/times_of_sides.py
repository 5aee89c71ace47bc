"""The stage times of device and server for `edgeclip plan`: measured, or one side predicted."""

import json
from collections.abc import Callable
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.planner import Choice
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.predicting.measured_device import MeasuredDevice, load_measured
from edgeclip.runtime.predicting.predict_stages import ends, predict_stages

Sides = tuple[StageTimes, StageTimes]  # device, server
_COSTS = "costs"  # a key that files of measured devices have, and files of stage times have not


def load_sides(device: str, server: str, cuts: CutSet) -> Sides:
    """Read the times of both sides; each is a file, or the name of a measured device.

    Args:
        device, server: what `edgeclip measure-cuts` wrote there, or `edgeclip measure-probes` on
            one of them, whose times are then predicted.
        cuts: what was cut.

    Raises:
        ConfigError: a file that is none of both, or an unknown name.
        InputError: nothing was measured of the cut set, or see `predict_stages`.
    """
    here, there = _load(device), _load(server)
    if isinstance(here, StageTimes):
        if isinstance(there, StageTimes):
            return here, there
        return here, predict_stages(there, cuts, here)
    if isinstance(there, StageTimes):
        return predict_stages(here, cuts, there), there
    raise InputError(
        "probes tell nothing of pictures, codecs and the bytes that cross: give what `edgeclip "
        "measure-cuts` wrote as the times of one side; the other may be a measured device"
    )


def _load(name_or_path: str) -> StageTimes | MeasuredDevice:
    path = Path(name_or_path)
    if not (path.is_file() or path.suffix == ".json" or "/" in name_or_path):
        return load_measured(name_or_path)
    return MeasuredDevice.load(path) if _is_measured(path) else StageTimes.load(path)


def _is_measured(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it says what is wrong
    return isinstance(data, dict) and _COSTS in data


def headings(sides: Sides) -> list[str]:
    """A line over the table for each side that was predicted."""
    return [
        f"{side}: towers predicted for {times.device}, within {times.predicted.within:.0%}"
        for side, times in zip(("device", "server"), sides, strict=True)
        if times.predicted is not None
    ]


def remarks(sides: Sides, choice: Choice, choose: Callable[[Sides], Choice]) -> list[str]:
    """What predicted times rest on, and whether the choice holds within their error.

    Args:
        sides: device and server.
        choice: what was chosen with these times.
        choose: chooses with others.
    """
    lines = []
    for number, (side, times) in enumerate(zip(("device", "server"), sides, strict=True)):
        if times.predicted is None:
            continue
        found = times.predicted
        lines.append(
            f"What the towers take on the {side} was not measured there, but predicted: "
            f"{found.method}. About nine in ten towers are within {found.within:.0%} of that; how "
            f"much times vary is taken from {found.others}. Probes run again and again, with "
            "warm caches: after other work a small tower takes longer."
        )
        factor = found.others_factor
        lines.append(
            f"Pictures and codecs are assumed to take {factor:.3g} times as long on the {side} as "
            f"on {found.others}{', as the whole tower does' if factor != 1 else ''}; bytes and "
            "cosines are those that were measured."
        )
        lines += _elsewhere(sides, number, choice, choose)
    return lines


def _elsewhere(
    sides: Sides, number: int, choice: Choice, choose: Callable[[Sides], Choice]
) -> list[str]:
    best, lines = choice.best.plan.name, []
    for words, end in zip(("fast", "slow"), ends(sides[number]), strict=True):
        other = choose((end, sides[1]) if number == 0 else (sides[0], end)).best.plan.name
        if other != best:
            lines.append(f"If these towers are as {words} as that allows, {other} would be chosen.")
    return lines or [f"Wherever these towers lie within that, {best} is chosen."]
