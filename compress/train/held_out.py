"""Hold pictures out of training, and measure on them how well a student agrees with its teacher."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeclip.compress.compute import ComputeType, autocast
from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.compress.train.train_loop import Validation
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.preprocess import crop_batch, normalise
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import pair_ranks

_log = logging.getLogger(__name__)
# What a line of `log.jsonl` calls the values of a validation; all are shares or cosines.
IMAGE_COSINE, TEXT_COSINE = "held_out_image_cosine", "held_out_text_cosine"
STUDENT_R1, TEACHER_R1 = "held_out_r1", "held_out_teacher_r1"

MOST_HELD_OUT = 256  # unless the user asks for more: R@1 is then known to 6 points
_BATCH = 64


@dataclass(frozen=True, slots=True)
class RowSplit:
    """The rows of a source to train on, and those held out: int64, ascending, none in both."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_rows(count: int, wanted: int | None = None) -> RowSplit:
    """Split `count` rows by a shuffle that depends on `count` alone.

    Args:
        count: number of pictures.
        wanted: number to hold out; None for a tenth, at most `MOST_HELD_OUT`.

    Raises:
        ConfigError: fewer than none, or nothing would be left to train on.
    """
    number = min(count // 10, MOST_HELD_OUT) if wanted is None else wanted
    if number < 0 or (number and number >= count):
        raise ConfigError(
            f"cannot hold {number} of {count} pictures out of training: choose 0 to {count - 1}"
        )
    order = np.random.default_rng(0).permutation(count)
    return RowSplit(np.sort(order[number:]), np.sort(order[:number]))


class HeldOut:
    """Compares a student with the cached embeddings of its teacher on held-out pictures.

    Args:
        student: the model, as it is at each call.
        cache: the teacher's embeddings; of the pictures, the unchanged view is used.
        source: the pictures, which are read once and kept as uint8 crops, with all their captions.
        rows: indices of the held-out pictures, at least one.
        compute: as in training.

    A picture that can no longer be read is left out, with a warning.

    Raises:
        InputError: none of the pictures can be read.
    """

    def __init__(
        self,
        student: DualEncoder,
        cache: TeacherCache,
        source: Source,
        rows: NDArray[np.int64],
        *,
        compute: ComputeType = "auto",
    ) -> None:
        self._student = student
        self._compute = compute
        crops, readable = [], []
        for index in rows.tolist():
            try:
                crops.append(crop_batch([source[index].image], student.image_spec))
            except InputError as error:
                _log.warning("left out of the held-out pictures: %s", error)
                continue
            readable.append(index)
        if not readable:
            raise InputError(
                f"none of the {len(rows)} held-out pictures of {source.name} can be read"
            )
        rows = np.array(readable)
        every = np.concatenate(crops)
        self._crops = [every[first : first + _BATCH] for first in range(0, len(every), _BATCH)]
        self._teacher_image = cache.image[rows, 0]
        self._ids: Tensor | None = None
        if cache.text is not None:
            captions = [source.captions(index) for index in rows.tolist()]
            self._ids = student.tokenize([text for own in captions for text in own])
            self._relevance = Relevance.of_captions(captions)
            number = np.concatenate([np.arange(len(own)) for own in captions])
            self._teacher_text = cache.text[rows[self._relevance.owner], number]
            self._teacher_r1 = self._r1(self._teacher_image, self._teacher_text)

    def __call__(self) -> Validation:
        """Measure cosines, and R@1 if there are captions; the score is the mean of the cosines."""
        image, text = self._embed()
        values = {IMAGE_COSINE: float(cosines(image, self._teacher_image).mean())}
        if text is None:
            cosine = values[IMAGE_COSINE]
            return Validation(score=cosine, values=values, says=f"cosine {cosine:.3f}")
        values[TEXT_COSINE] = float(cosines(text, self._teacher_text).mean())
        values[STUDENT_R1], values[TEACHER_R1] = self._r1(image, text), self._teacher_r1
        return Validation(
            score=(values[IMAGE_COSINE] + values[TEXT_COSINE]) / 2,
            values=values,
            says=f"cosine {values[IMAGE_COSINE]:.3f} image, {values[TEXT_COSINE]:.3f} text, "
            f"R@1 {values[STUDENT_R1]:.1%} (teacher {self._teacher_r1:.1%})",
        )

    def _r1(self, image: NDArray[Any], text: NDArray[Any]) -> float:
        return float(pair_ranks(image, text, self._relevance).hits(1).mean())

    def _embed(self) -> tuple[FloatArray, FloatArray | None]:
        student = self._student
        text: list[Tensor] | None = None
        with torch.inference_mode(), autocast(self._compute, student.device):
            image = [
                student.embed_image(
                    torch.from_numpy(normalise(crops, student.image_spec)).to(student.device)
                )
                for crops in self._crops
            ]
            if self._ids is not None:
                text = [student.embed_text(ids) for ids in self._ids.split(_BATCH)]
        return _array(image), None if text is None else _array(text)


def _array(parts: list[Tensor]) -> FloatArray:
    rows: FloatArray = torch.cat(parts).float().cpu().numpy()
    return rows
