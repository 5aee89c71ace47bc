"""Measure on pictures held out of training how well a student agrees with its teacher."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeclip.compress.compute import ComputeType, autocast
from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.compress.train.kept_weights import Validation
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.preprocess import crop_batch, normalise
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import pair_ranks

_log = logging.getLogger(__name__)
# What a line of `log.jsonl` calls the values of a validation; all are shares or cosines.
IMAGE_COSINE, TEXT_COSINE = "held_out_image_cosine", "held_out_text_cosine"
# R@1 of images that look for their text, and of texts that look for their image.
STUDENT_R1 = ("held_out_image_r1", "held_out_text_r1")
TEACHER_R1 = ("held_out_teacher_image_r1", "held_out_teacher_text_r1")

_BATCH = 64


class HeldOut:
    """Compares a student with the cached embeddings of its teacher on held-out pictures.

    Args:
        student: the model, as it is at each call.
        cache: the teacher's embeddings; of the pictures, the unchanged view is used.
        source: the pictures, which are read once and kept as uint8 crops, with all their captions.
        rows: indices of the held-out pictures, int64, at least one.
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
        unreadable = set(cache.unreadable)
        for index in rows.tolist():
            if index in unreadable:
                continue
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
        every = np.concatenate(crops)
        self._crops = [every[first : first + _BATCH] for first in range(0, len(every), _BATCH)]
        self._teacher_image = cache.image(readable)
        self._ids: Tensor | None = None
        captions = [source.captions(index) for index in readable]
        with_text = [place for place, own in enumerate(captions) if own]
        if with_text:
            own = [captions[place] for place in with_text]
            self._with_text = np.array(with_text)
            self._ids = student.tokenize([text for texts in own for text in texts])
            self._relevance = Relevance.of_captions(own)
            number = np.concatenate([np.arange(len(texts)) for texts in own])
            owners = self._with_text[self._relevance.owner]
            indices = [readable[place] for place in owners.tolist()]
            self._teacher_text = cache.text(indices, number.tolist())
            self._teacher_r1 = self._r1(self._teacher_image, self._teacher_text)

    def __call__(self) -> Validation:
        """Measure cosines, and R@1 if there are captions; the score is the mean of the cosines."""
        image, text = self._embed()
        values = {IMAGE_COSINE: float(cosines(image, self._teacher_image).mean())}
        if text is None:
            cosine = values[IMAGE_COSINE]
            return Validation(score=cosine, values=values, says=f"cosine {cosine:.3f}")
        values[TEXT_COSINE] = float(cosines(text, self._teacher_text).mean())
        ours, theirs = self._r1(image, text), self._teacher_r1
        values |= dict(zip((*STUDENT_R1, *TEACHER_R1), (*ours, *theirs), strict=True))
        return Validation(
            score=(values[IMAGE_COSINE] + values[TEXT_COSINE]) / 2,
            values=values,
            says=f"cosine {values[IMAGE_COSINE]:.3f} image, {values[TEXT_COSINE]:.3f} text, R@1 "
            f"{ours[0]:.1%} and {ours[1]:.1%} (teacher {theirs[0]:.1%} and {theirs[1]:.1%})",
        )

    def _r1(self, image: NDArray[Any], text: NDArray[Any]) -> tuple[float, float]:
        """Return R@1 from image to text, and from text to image."""
        ranks = pair_ranks(image[self._with_text], text, self._relevance)
        return float(ranks.image_hits(1).mean()), float(ranks.text_hits(1).mean())

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
