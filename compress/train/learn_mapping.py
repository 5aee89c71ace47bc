"""Learn the linear map from a teacher's weights to a student's, before the student is distilled."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeclip.compress.data.sources import Source
from edgeclip.compress.students.importance import Importance
from edgeclip.compress.students.mapping import fold, with_maps
from edgeclip.compress.students.student import StudentShape, chosen, inheritance
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad

_log = logging.getLogger(__name__)

_VALIDATIONS = 4


def learn_mapping(
    student: DualEncoder,
    teacher: DualEncoder,
    shape: StudentShape,
    importance: Importance,
    caches: TeacherCache | Sequence[TeacherCache],
    source: Source,
    *,
    loss_weights: LossWeights,
    settings: TrainSettings,
    out: Path,
    start: str = "",
    held_out: int | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
) -> None:
    """Give `student` the weights that a learned map makes of the teacher's; see `with_maps`.

    The map is trained as `distill` trains weights, `shape.mapping_steps` long, without decay: it
    would pull a map towards 0. Log and checkpoint lie in `out`; a run that was stopped goes on, and
    one that has ended is not learned again.

    Args:
        student: as `new_student` made it of this shape and importance.
        teacher: what it inherits from.
        shape, importance: what the map begins with.
        caches, source, loss_weights, settings, start, held_out, max_bad: as for `distill`.
        out: a directory of its own.

    Raises:
        ConfigError: as for `distill`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step in hand was saved.
    """
    choice = chosen(student, teacher, shape, importance)
    mapped = with_maps(student, *inheritance(student, teacher, shape), choice)
    if mapped is None:
        return  # it is the teacher, whole
    steps = shape.mapping_steps
    _log.info("learning the map from the teacher's weights to the student's in %d steps", steps)
    distill(
        mapped,
        caches,
        source,
        loss_weights=loss_weights,
        settings=replace(
            settings,
            steps=steps,
            warmup_steps=min(settings.warmup_steps, steps // 4),
            weight_decay=0.0,
            validations=_VALIDATIONS,
            patience=0,
            ema=0.0,
            track=(),
        ),
        out=out,
        held_out=held_out,
        max_bad=max_bad,
        start=f"mapped {start}",
    )
    fold(mapped, student)
