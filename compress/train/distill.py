"""Distil a student: train it to reproduce the teacher's cached embeddings."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeclip.compress.compute import full_precision
from edgeclip.compress.data.sources import Source, seed_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, augment
from edgeclip.compress.train.held_out import HeldOut, split_rows
from edgeclip.compress.train.losses import (
    LossWeights,
    distillation_losses,
    equal_rows,
    feature_loss,
)
from edgeclip.compress.train.train_loop import BestStep, TrainSettings, TrainTask, train
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad, report_bad

_log = logging.getLogger(__name__)

_VALIDATIONS = 20  # in a run, besides that of the first step
_TRAINED_PER_HELD_OUT = 4  # pictures to train on, at least, for each that is validated


@dataclass(frozen=True, slots=True)
class DistillationBatch:
    """The batch of one step: the student's inputs and the teacher's embeddings of them.

    `ids` and `teacher_text` are None for pictures without captions.
    """

    pixels: Tensor
    teacher_image: Tensor
    ids: Tensor | None = None
    teacher_text: Tensor | None = None


def distill(
    student: DualEncoder,
    cache: TeacherCache,
    source: Source,
    *,
    loss_weights: LossWeights,
    settings: TrainSettings,
    out: Path,
    held_out: int | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
) -> BestStep | None:
    """Train `student` in place; write checkpoints and `log.jsonl` to `out`.

    `held_out` pictures (default: see `split_rows`) are not trained on: on them student and teacher
    are compared while training goes on, and the student ends as it was where they agreed best.
    Returns that step; None if nothing is held out.

    Pictures without captions train the image tower alone, by the feature loss. The text tower is
    frozen. It should be the teacher's unmodified text tower; this is not checked here.

    Raises:
        ConfigError: the cache was made from other data than `source`, or the student's
            embeddings have another length than the teacher's.
    """
    if cache.settings.source != source.identity:
        raise ConfigError(f"the teacher cache was made from other data than {source.name}")
    if cache.settings.dim != student.spec.dim:
        raise ConfigError(
            f"the teacher embeds to {cache.settings.dim} numbers, the student to "
            f"{student.spec.dim}: they must share one space"
        )
    if cache.text is None:
        student.model.text_model.requires_grad_(False)
        student.model.text_projection.requires_grad_(False)
    split = split_rows(len(source), held_out)
    validate = None
    if len(split.held_out):
        validate = HeldOut(student, cache, source, split.held_out, compute=settings.compute)
    else:
        _log.info(
            "none of %d pictures is held out, so nothing tells whether student and teacher agree "
            "on others",
            len(source),
        )

    def losses(batch: DistillationBatch) -> dict[str, Tensor]:
        image = student.embed_image(batch.pixels)
        if batch.ids is None or batch.teacher_text is None:
            return {"total": feature_loss(image, batch.teacher_image)}
        text = student.embed_text(batch.ids)
        with full_precision(student.device):
            return distillation_losses(
                loss_weights,
                image=image,
                text=text,
                teacher_image=batch.teacher_image,
                teacher_text=batch.teacher_text,
                scale=cache.settings.logit_scale,
                same=equal_rows(batch.ids),
            )

    seldom = _TRAINED_PER_HELD_OUT * len(split.held_out) // settings.batch_size
    return train(
        TrainTask(
            title="distill",
            module=student,
            batch=DistillationBatches(
                student, cache, source, settings, rows=split.train, max_bad=max_bad
            ),
            losses=losses,
            identity=_identity(student, cache, loss_weights, len(split.held_out)),
            validate=validate,
            validate_every=max(1, settings.steps // _VALIDATIONS, seldom),
        ),
        settings,
        out,
    )


class DistillationBatches:
    """Make the batch of each step.

    It depends only on seed and step, so a resumed run sees the same batches. Every epoch shuffles
    all pairs anew. Epoch e uses the augmented view number e mod (number of cached views), and of
    each picture the caption number e mod (number of its captions). A picture that can no longer be
    read is left out of its batches and named once; `max_bad` is their most.

    Args:
        student: makes the inputs.
        cache: the teacher's embeddings.
        source: the pairs.
        settings: the seed, and the size of a batch.
        rows: indices of the pairs to use, int64; None for all.
    """

    def __init__(
        self,
        student: DualEncoder,
        cache: TeacherCache,
        source: Source,
        settings: TrainSettings,
        *,
        rows: NDArray[np.int64] | None = None,
        max_bad: MaxBad = DEFAULT_MAX_BAD,
    ) -> None:
        self._max_bad = max_bad
        self._bad: dict[int, str] = {}
        self._student = student
        self._cache = cache
        self._source = source
        self._settings = settings
        self._rows = np.arange(len(source)) if rows is None else rows

    def pairs_of_step(self, step: int) -> tuple[list[int], list[int]]:
        """Return the index and the view number of each pair in a batch."""
        count, size = len(self._rows), self._settings.batch_size
        indices: list[int] = []
        views: list[int] = []
        position = step * size
        while len(indices) < size:
            epoch, offset = divmod(position + len(indices), count)
            taken = self._order(epoch)[offset : offset + size - len(indices)].tolist()
            indices += taken
            views += [epoch % self._cache.settings.views] * len(taken)
        return indices, views

    def __call__(self, step: int) -> DistillationBatch:
        augmentation = self._cache.settings.augmentation
        pictures, places, indices, views = [], [], [], []
        for place, (index, view) in enumerate(zip(*self.pairs_of_step(step), strict=True)):
            try:
                image, seed = self._source[index].image, seed_of(self._source, index)
            except InputError as error:
                self._skip(index, str(error))
                continue
            pictures.append(augment(image, augmentation, picture_seed=seed, view=view))
            places.append(step * self._settings.batch_size + place)
            indices.append(index)
            views.append(view)
        if not pictures:
            raise InputError(f"no picture of step {step + 1} can be read: {self._bad[index]}")
        pixels = self._student.preprocess(pictures)
        teacher_image = self._tensor(self._cache.image[indices, views])
        if self._cache.text is None:
            return DistillationBatch(pixels, teacher_image)
        numbers, captions = [], []
        for place, index in zip(places, indices, strict=True):
            own = self._source.captions(index)
            numbers.append(place // len(self._rows) % len(own))
            captions.append(own[numbers[-1]])
        ids = self._student.tokenize(captions)
        return DistillationBatch(
            pixels, teacher_image, ids, self._tensor(self._cache.text[indices, numbers])
        )

    def _skip(self, index: int, reason: str) -> None:
        """Leave a picture out that was readable when it was cached.

        Raises:
            InputError: there are more of them than may be.
        """
        if index not in self._bad:
            self._bad[index] = reason
            _log.warning("left out of training: %s", reason)
        if len(self._bad) > self._max_bad.allowed(len(self._source)):
            report_bad(list(self._bad.values()), len(self._source), self._max_bad)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(np.random.SeedSequence((self._settings.seed, epoch)))
        order: NDArray[np.int64] = self._rows[rng.permutation(len(self._rows))]
        return order

    def _tensor(self, rows: NDArray[np.float16]) -> Tensor:
        tensor = torch.from_numpy(rows.astype(np.float32)).to(self._student.device)
        return torch.nn.functional.normalize(tensor, dim=-1)  # float16 rounds lengths off 1


def _identity(
    student: DualEncoder, cache: TeacherCache, loss_weights: LossWeights, held_out: int
) -> str:
    """Return the identity of a run.

    The full model config is not part of it, because it contains the teacher's path and a date.
    """
    sizes = {name: list(value.shape) for name, value in student.model.state_dict().items()}
    weights = asdict(loss_weights)
    parts = (asdict(cache.settings), student.model.config.model_type, sizes, weights, held_out)
    return "distill " + json.dumps(parts, sort_keys=True)
