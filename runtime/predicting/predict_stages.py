"""Stage times of a cut set on a device where only probes were measured.

Probes tell what a tower takes, and each part of it. They tell nothing of pictures and codecs:
these are taken from a machine where the cut set itself was measured, and so are the bytes that
cross and what a codec costs, which are the same everywhere.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.stage_times import Predicted, Stage, StageSamples, StageTimes
from edgeclip.runtime.predicting.measured_device import MeasuredDevice
from edgeclip.runtime.predicting.pieces_before import pieces_before
from edgeclip.runtime.predicting.predict_latency import Predictor
from edgeclip.runtime.predicting.read_tower import read_image_tower

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
