"""Losses of distillation and contrastive training; all take L2-normalised embeddings.

Shapes: image and text embeddings are float [N, dim], row i of each is one pair.

The targets between image and text are soft: the teacher's own similarities (TinyCLIP's affinity
mimicking, MobileCLIP's distillation loss). A one-hot target, "the own caption and no other", is
one that the teacher itself misses wherever it does not know the pictures. Its gradient at the
teacher's own embeddings is scale (P - I) T for the teacher's probabilities P and texts T, which is
not 0 and, at a logit scale of 100, many times that of the feature loss: the student is pulled out
of the teacher's space. With soft targets, every loss here but the plain contrastive one is 0, and
so is its gradient, where student and teacher are equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, same: Tensor | None = None
) -> Tensor:
    """Return the symmetric InfoNCE loss over the batch, a scalar (CLIP, Radford et al. 2021).

    `same` (bool [N, N]) tells which pairs have an equal caption: each of them is as right as the
    own one (Khosla et al. 2020, eq. 2). None if all captions differ.
    """
    logits = scale * image @ text.T
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    target = same / same.sum(dim=-1, keepdim=True)  # symmetric, as `same` is in equal rows
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def equal_captions(keys: Tensor) -> Tensor:
    """Tell which captions are equal: a number of each caption, int64 [N], to bool [N, N]."""
    return keys[:, None] == keys


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 5 (1 - cos) between matching rows: feature distillation, a scalar."""
    return 5 * (1 - (student * teacher).sum(dim=-1)).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """A teacher's embeddings of a batch: image and text float [N, dim], and its logit scale."""

    image: Tensor
    text: Tensor
    scale: float

    def chosen(self, rows: Tensor) -> "TeacherRows":
        """Return the rows of a mask, bool [N]."""
        return TeacherRows(image=self.image[rows], text=self.text[rows], scale=self.scale)


def affinity_loss(
    image: Tensor, text: Tensor, teachers: Sequence[TeacherRows], same: Tensor | None = None
) -> Tensor:
    """Let the similarities of the student's images and texts mimic the teachers', a scalar.

    Affinity mimicking of TinyCLIP (Wu et al. 2023, eq. 3), see `_mimic`. Several teachers, each at
    its own scale, are averaged after the softmax (MobileCLIP, Vasu et al. 2024, sec. 4); the
    student answers at the scale of the first.
    """
    logits = teachers[0].scale * image @ text.T
    to_texts, to_images = _log_probabilities(teachers)
    return (_mimic(logits, to_texts, same) + _mimic(logits.T, to_images, same)) / 2


def interactive_loss(
    image: Tensor, text: Tensor, teachers: Sequence[TeacherRows], same: Tensor | None = None
) -> Tensor:
    """Let the student's images find among the teacher's texts what the teacher's do, and texts so.

    Interactive contrastive learning of CLIP-KD (Yang et al. 2024, eq. 8), but with the teachers'
    own similarities as targets, see `_mimic`. The texts are those of the first teacher, in whose
    space the student lives.
    """
    first = teachers[0]
    to_texts, to_images = _log_probabilities(teachers)
    images = _mimic(first.scale * image @ first.text.T, to_texts, same)
    texts = _mimic(first.scale * text @ first.image.T, to_images, same)
    return (images + texts) / 2


def _log_probabilities(teachers: Sequence[TeacherRows]) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the teachers' mean chances: of each image's texts, and of texts."""
    with torch.no_grad():
        logits = [own.scale * own.image @ own.text.T for own in teachers]
        to_texts, to_images = (
            torch.stack([F.log_softmax(given, dim=-1) for given in each]).logsumexp(dim=0)
            - math.log(len(teachers))
            for each in (logits, [own.T for own in logits])
        )
    return to_texts, to_images


def _mimic(student: Tensor, target: Tensor, same: Tensor | None) -> Tensor:
    """Return KL(target || student) of the softmax of each row of logits [N, N], averaged.

    `target` holds logarithms of chances. A row counts as much as the teacher knows in it: its
    probability of what is right, the own column or any with an equal caption (`same`, bool
    [N, N]). The rest tells nothing about how image and text belong together, and fitting it at a
    scale of 100 costs the features.
    """
    with torch.no_grad():
        chance = target.exp()
        known = chance.diagonal() if same is None else (chance * same).sum(dim=-1)
    each = F.kl_div(F.log_softmax(student, dim=-1), target, reduction="none", log_target=True)
    return (known * each.sum(dim=-1)).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The weight of each loss; 0 leaves a loss out."""

    affinity: Annotated[float, Ge(0)] = 1.0
    feature: Annotated[float, Ge(0)] = 1.0
    interactive: Annotated[float, Ge(0)] = 1.0
    contrastive: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        try:
            check_bounds(self)
        except ValueError as error:
            raise ConfigError(f"weights of losses: {error}") from error
        if not any(getattr(self, item.name) for item in fields(self)):
            raise ConfigError("the weights of all losses are 0, so there is nothing to learn")


def distillation_losses(
    weights: LossWeights,
    *,
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    captioned: Tensor | None = None,
    same: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return every weighted loss by name, and their weighted sum as `total`.

    Args:
        weights: the weight of each loss.
        image, text: the student's embeddings.
        teachers: at least one; the student lives in the space of the first.
        captioned: which pictures have a caption, bool [N]; the text rows of the others mean
            nothing, and their image rows learn by the feature loss alone. None for all.
        same: which captions are equal, bool [N, N]; None if all differ.
    """
    first = teachers[0]
    if captioned is None:
        captioned = torch.ones(len(image), dtype=torch.bool, device=image.device)
    if not captioned.any():
        loss = feature_loss(image, first.image) / 2  # as much as pictures count in other batches
        return {"total": weights.feature * loss, "feature": loss}
    every, text = image, text[captioned]
    image, pairs = image[captioned], [own.chosen(captioned) for own in teachers]
    same = None if same is None else same[captioned][:, captioned]
    parts: dict[str, Tensor] = {}
    if weights.feature:
        parts["feature"] = (
            feature_loss(every, first.image) + feature_loss(text, pairs[0].text)
        ) / 2
    if weights.affinity:
        parts["affinity"] = affinity_loss(image, text, pairs, same)
    if weights.interactive:
        parts["interactive"] = interactive_loss(image, text, pairs, same)
    if weights.contrastive:
        parts["contrastive"] = contrastive_loss(image, text, first.scale, same)
    total = sum(
        (getattr(weights, name) * value for name, value in parts.items()),
        start=torch.zeros((), device=image.device),
    )
    return {"total": total, **parts}
