"""Predict the stage times of a cut set on a device where only probes were measured."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from edgeclip.profiles.predict.measured_device import MeasuredDevice, load_measured
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.tower_shapes import (
    AnyTower,
    TowerBlock,
    TransformerTower,
    read_image_tower,
)
from edgeclip.runtime.console import percent
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import PlanChoice
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.stage_times import Predicted, SplitStage, StageSamples, StageTimes

_CUT_NAME = re.compile(r"(before|in|after) block (\d+(?:\.\d+)?)(?: \(\d+\))?")


def prefix_cost(tower: AnyTower, cut: str, cost: Callable[[TowerBlock], float]) -> float:
    """Sum the costs of the blocks of an image tower that run before a cut.

    The block that a cut lies in is divided by multiply-adds.

    Args:
        tower: the whole.
        cut: name of the cut, such as "after block 3"; of a ConvNeXt "after block 1.0", which is
            the first block of the second stage.
        cost: cost of one block.

    Raises:
        InputError: the name tells no place in this tower.
    """
    found = _CUT_NAME.fullmatch(cut)
    order = _blocks_in_order(tower)
    labels = [label for label, _ in order]
    if found is None or found[2] not in labels:
        raise InputError(
            f"the cut {cut!r} tells no place in this tower of {len(set(labels)) - 1} blocks: "
            "measure its stages with `edgeclip measure-cuts`"
        )
    where, at = found[1], labels.index(found[2])
    before, block = sum(cost(block) for _, block in order[:at]), order[at][1]
    return before if where == "before" else before + _share_done(block, where) * cost(block)


def _blocks_in_order(tower: AnyTower) -> Sequence[tuple[str, TowerBlock]]:
    """Blocks in the order in which they run; stem, steps down and head have an empty label."""
    if isinstance(tower, TransformerTower):
        blocks = [(str(layer), tower.block()) for layer in range(tower.layers - 1)]
        return [("", tower.stem()), *blocks, (str(tower.layers - 1), tower.last())]
    order = [("", tower.stem())]
    for stage, depth in enumerate(tower.depths):
        order += [("", tower.down(stage))] if stage else []
        order += [(f"{stage}.{layer}", tower.block(stage)) for layer in range(depth)]
    return [*order, ("", tower.head())]


def _share_done(block: TowerBlock, where: str) -> float:
    """Part of a block that is done after its attention ("in"), or at its end ("after").

    In the last block of a transformer the projection into the embedding space comes behind it.
    """
    width, at, hidden = block.width, block.positions, block.hidden
    if block.kind == "image-last":
        attention = 2 * at * width**2 + 2 * at * width + 2 * width**2
        mlp, behind = 2 * width * hidden, width * block.given
    else:
        attention, mlp, behind = 4 * at * width**2 + 2 * at**2 * width, 2 * at * width * hidden, 0
    done = attention if where == "in" else attention + mlp
    return done / (attention + mlp + behind)


CONFIG_NAME = "config.json"
_WHOLE = SplitStage(kind="tail", cut=0)
_LEAST_MS = 1e-4  # of a median that times are divided by


def predicted_stage_times(measured: MeasuredDevice, cuts: CutSet, known: StageTimes) -> StageTimes:
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

    def block_ms(block: TowerBlock) -> float:
        return predictor.block_ms(block, about.precision)

    ms = {_WHOLE: whole.ms}
    for point in about.points[1:]:
        before = prefix_cost(tower, point.name, block_ms)
        ms[SplitStage(kind="head", cut=point.number)] = before
        ms[SplitStage(kind="tail", cut=point.number)] = max(0.0, whole.ms - before)
    factor = 1.0
    if measured.device.on_cpu and known.on_cpu:
        factor = whole.ms / float(np.median(known.ms(_WHOLE)))
        # Differences between probes do not tell what a run costs by itself, and that is nearly all
        # that the shortest part of a tower takes.
        towers = (item.ms for item in known.stages if item.stage.kind in ("head", "tail"))
        least = factor * min(float(np.median(times)) for times in towers)
        ms = {stage: max(least, value) for stage, value in ms.items()}
    disturbed = measured.interference is not None and measured.interference.disturbed
    return replace(
        known,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=measured.command,
        machine=measured.machine,
        device=measured.name,
        stages=tuple(_scaled(item, ms.get(item.stage), factor) for item in known.stages),
        waiting_share=None,
        steal_share=None,
        contended=disturbed or known.contended,
        energy_sensor=None,
        on_cpu=measured.device.on_cpu,
        predicted=Predicted(
            within=None if math.isinf(whole.high) else whole.high / whole.ms - 1,
            level=whole.level,
            method=whole.method,
            others=known.device,
            others_factor=factor,
        ),
    )


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


def _scaled(item: StageSamples, ms: float | None, factor: float) -> StageSamples:
    """Move the samples of a stage to a median of `ms`; without one multiply them by `factor`."""
    times = np.array(item.ms)
    scale = factor if ms is None else ms / max(float(np.median(times)), _LEAST_MS)
    return StageSamples(stage=item.stage, ms=tuple(map(float, scale * times)))


def fast_and_slow(times: StageTimes) -> tuple[StageTimes, ...]:
    """Return predicted times with towers as fast, and as slow, as the prediction allows.

    Nothing where the times were measured, or where the prediction has no bound.
    """
    if times.predicted is None or times.predicted.within is None:
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


StageTimesPair = tuple[StageTimes, StageTimes]  # device, server
_COSTS = "costs"  # a key that files of measured devices have, and files of stage times have not


def load_stage_times(device: str, server: str, cuts: CutSet) -> StageTimesPair:
    """Read the times of both sides; each is a file, or the name of a measured device.

    Args:
        device, server: what `edgeclip measure-cuts` wrote there, or `edgeclip measure-probes` on
            one of them, whose times are then predicted.
        cuts: what was cut.

    Raises:
        ConfigError: a file that is none of both, or an unknown name.
        InputError: nothing was measured of the cut set, or see `predicted_stage_times`.
    """
    here, there = _load(device), _load(server)
    if isinstance(here, StageTimes):
        if isinstance(there, StageTimes):
            return here, there
        return here, predicted_stage_times(there, cuts, here)
    if isinstance(there, StageTimes):
        return predicted_stage_times(here, cuts, there), there
    raise InputError(
        "probes tell nothing of pictures, codecs and the bytes that cross: give what `edgeclip "
        "measure-cuts` wrote as the times of one side; the other may be a measured device"
    )


def _load(name_or_path: str) -> StageTimes | MeasuredDevice:
    path = Path(name_or_path)
    if not (path.is_file() or path.suffix == ".json" or "/" in name_or_path):
        return load_measured(name_or_path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None  # whoever reads it says what is wrong
    is_measured = isinstance(data, dict) and _COSTS in data
    return MeasuredDevice.load(path) if is_measured else StageTimes.load(path)


def prediction_headings(sides: StageTimesPair) -> list[str]:
    """Return a line above the table of plans for each side that was predicted."""
    return [
        f"{side}: towers predicted for {times.device}, {_within(times.predicted)}"
        for side, times in zip(("device", "server"), sides, strict=True)
        if times.predicted is not None
    ]


def _within(found: Predicted) -> str:
    if found.within is None:
        return "without a bound"
    worth = "by a rule of thumb" if found.level is None else f"in {percent(found.level)} of cases"
    return f"within {found.within:.0%} {worth}"


def prediction_remarks(
    sides: StageTimesPair, choice: PlanChoice, choose: Callable[[StageTimesPair], PlanChoice]
) -> list[str]:
    """Say what predicted times rest on, and whether the choice holds within their error.

    Args:
        sides: device and server.
        choice: what was chosen with these times.
        choose: chooses with others.
    """
    lines = []
    for number, (side, times) in enumerate(zip(("device", "server"), sides, strict=True)):
        if times.predicted is None:
            continue
        found, factor = times.predicted, times.predicted.others_factor
        lines.append(
            f"What the towers take on the {side} was not measured there, but predicted: "
            f"{found.method}. Of a tower like those measured there that is true "
            f"{_within(found)}; how much times vary is taken from {found.others}. Probes run again "
            "and again, with warm caches: after other work a small tower takes longer."
        )
        lines.append(
            f"Pictures and codecs are assumed to take {factor:.3g} times as long on the {side} as "
            f"on {found.others}{', as the whole tower does' if factor != 1 else ''}; bytes and "
            "cosines are those that were measured."
        )
        best, others = choice.best.plan.name, []
        ends = fast_and_slow(times)
        if not ends:
            lines.append("Whether another plan would be chosen within its error cannot be said.")
            continue
        for words, end in zip(("fast", "slow"), ends, strict=True):
            other = choose((end, sides[1]) if number == 0 else (sides[0], end)).best.plan.name
            if other != best:
                others.append(
                    f"If these towers are as {words} as that allows, {other} would be chosen."
                )
        lines += others or [f"Wherever these towers lie within that, {best} is chosen."]
    return lines
