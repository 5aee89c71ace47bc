"""Predict the stage times of a cut set for a device where only probes were measured."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.profiles.predict.measured_device import MeasuredDevice, load_measured
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.tower_shapes import (
    AnyTower,
    ConvTower,
    Piece,
    TransformerTower,
    read_image_tower,
)
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.planner import Choice
from edgeclip.runtime.planning.stage_times import Predicted, Stage, StageSamples, StageTimes

_NAME = re.compile(r"(before|in|after) block (\d+(?:\.\d+)?)(?: \(\d+\))?")


@dataclass(frozen=True, slots=True)
class Share:
    """A piece, and how much of its time lies before a cut, from 0 to 1."""

    piece: Piece
    share: float


def pieces_before(tower: AnyTower, name: str) -> tuple[Share, ...]:
    """The pieces of an image tower that are run before a cut.

    The block that a cut lies in is divided by multiply-adds.

    Args:
        tower: the whole.
        name: of the cut, such as "after block 3"; of a ConvNeXt "after block 1.0", which is the
            first block of the second stage.

    Raises:
        InputError: the name tells no place in this tower.
    """
    found = _NAME.fullmatch(name)
    order = _order(tower)
    labels = [label for label, _ in order]
    if found is None or found[2] not in labels:
        raise InputError(
            f"the cut {name!r} tells no place in this tower of {len(set(labels)) - 1} blocks: "
            "measure its stages with `edgeclip measure-cuts`"
        )
    where, at = found[1], labels.index(found[2])
    before = [Share(piece, 1.0) for _, piece in order[:at]]
    piece = order[at][1]
    if where == "before":
        return tuple(before)
    return (*before, Share(piece, _share(piece, where)))


def _order(tower: AnyTower) -> Sequence[tuple[str, Piece]]:
    """All pieces as they are run; those that are no block have an empty label."""
    if isinstance(tower, TransformerTower):
        blocks = [(str(layer), tower.block()) for layer in range(tower.layers - 1)]
        return [("", tower.stem()), *blocks, (str(tower.layers - 1), tower.last())]
    return _order_of_stages(tower)


def _order_of_stages(tower: ConvTower) -> Sequence[tuple[str, Piece]]:
    order = [("", tower.stem())]
    for stage, depth in enumerate(tower.depths):
        order += [("", tower.down(stage))] if stage else []
        order += [(f"{stage}.{layer}", tower.block(stage)) for layer in range(depth)]
    return [*order, ("", tower.head())]


def _share(piece: Piece, where: str) -> float:
    """How much of a block is done after its attention ("in"), or at its end ("after").

    In the last block of a transformer the projection into the embedding space comes behind it.
    """
    width, at, hidden = piece.width, piece.positions, piece.hidden
    if piece.kind == "image-last":
        attention = 2 * at * width**2 + 2 * at * width + 2 * width**2
        mlp, behind = 2 * width * hidden, width * piece.given
    else:
        attention, mlp, behind = 4 * at * width**2 + 2 * at**2 * width, 2 * at * width * hidden, 0
    done = attention if where == "in" else attention + mlp
    return done / (attention + mlp + behind)


CONFIG_NAME = "config.json"
_WHOLE = Stage(kind="tail", cut=0)
_LEAST_MS = 1e-4  # of a median that times are divided by


def predict_stages(measured: MeasuredDevice, cuts: CutSet, known: StageTimes) -> StageTimes:
    """Predict the stages of a cut set on a measured device.

    Heads and tails vary from round to round by as much, relative to their median, as on the
    machine of `known`. Where both machines run the tower on the CPU, pictures and codecs are taken
    to be slower by the factor by which the whole tower is, and no head or tail to be shorter than
    the shortest of `known` times that factor; else pictures and codecs are taken to take as long.

    Args:
        measured: the device.
        cuts: whose stages.
        known: what was measured of `cuts` on another machine.

    Raises:
        InputError: `known` is of another tower, the device may not run the tower, or its sizes are
            too far from those that were measured.
        ConfigError: the cut set does not tell the sizes of its tower.
    """
    about = cuts.manifest
    known.check_same_tower(about, "the cut set")
    _check_device(measured, cuts)
    tower = read_image_tower(_config_of(cuts), image_size=about.image.size, dim=about.dim)
    predictor = Predictor(measured)
    whole = predictor.predict(tower, about.precision)
    ms = {_WHOLE: whole.ms}
    for point in about.points[1:]:
        before = sum(
            item.share * predictor.piece_ms(item.piece, about.precision)
            for item in pieces_before(tower, point.name)
        )
        ms[Stage(kind="head", cut=point.number)] = before
        ms[Stage(kind="tail", cut=point.number)] = max(0.0, whole.ms - before)
    factor = 1.0
    if measured.device.on_cpu and known.on_cpu:
        factor = whole.ms / float(np.median(known.ms(_WHOLE)))
        least = factor * _shortest(known)
        ms = {stage: max(least, value) for stage, value in ms.items()}
    disturbed = measured.interference is not None and measured.interference.disturbed
    return replace(
        known,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=measured.command,
        machine=measured.machine,
        device=measured.name,
        stages=tuple(_stages(known, ms, factor)),
        waiting_share=None,
        steal_share=None,
        contended=disturbed or known.contended,
        energy_sensor=None,
        on_cpu=measured.device.on_cpu,
        predicted=Predicted(
            within=whole.high / whole.ms - 1,
            method=whole.method,
            others=known.device,
            others_factor=factor,
        ),
    )


def _shortest(known: StageTimes) -> float:
    """Milliseconds of the shortest part of the tower: nearly all of it is the run itself.

    Differences between probes do not tell what a run costs by itself.
    """
    towers = (item.ms for item in known.stages if item.stage.kind in ("head", "tail"))
    return min(float(np.median(times)) for times in towers)


def _check_device(measured: MeasuredDevice, cuts: CutSet) -> None:
    about, device = cuts.manifest, measured.device
    if about.precision not in device.precisions:
        why = "does not allow"
    elif about.needs_vnni and not device.vnni:
        why = "computes wrongly"
    else:
        return
    raise InputError(
        f"{cuts.path} is cut in {about.precision}, which device {measured.name!r} {why}: cut the "
        "bundle again with another --precision"
    )


def _config_of(cuts: CutSet) -> Path:
    if not any(file.path == CONFIG_NAME for file in cuts.manifest.files):
        raise InputError(
            f"{cuts.path} holds no {CONFIG_NAME}, which tells the sizes of its tower: cut the "
            "bundle again, or measure its stages with `edgeclip measure-cuts`"
        )
    return cuts.path / CONFIG_NAME


def _stages(known: StageTimes, ms: dict[Stage, float], factor: float) -> Iterator[StageSamples]:
    """Stages of `known`: those in `ms` moved to that median, all others times `factor`."""
    for item in known.stages:
        times, scale = np.array(item.ms), factor
        if item.stage in ms:
            scale = ms[item.stage] / max(float(np.median(times)), _LEAST_MS)
        yield StageSamples(stage=item.stage, ms=tuple(map(float, scale * times)))


def ends(times: StageTimes) -> tuple[StageTimes, ...]:
    """Predicted times with towers as fast, and as slow, as the prediction allows."""
    if times.predicted is None:
        return ()
    slow = 1 + times.predicted.within
    return tuple(
        replace(
            times,
            stages=tuple(
                replace(item, ms=tuple(scale * ms for ms in item.ms))
                if item.stage.kind in ("head", "tail")
                else item
                for item in times.stages
            ),
        )
        for scale in (1 / slow, slow)
    )


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
