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
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

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


def equal_rows(ids: Tensor) -> Tensor:
    """Tell which captions are equal: token ids [N, length] to bool [N, N]."""
    caption: Tensor = torch.unique(ids, dim=0, return_inverse=True)[1]
    return caption[:, None] == caption


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 5 (1 - cos) between matching rows: feature distillation, a scalar."""
    return 5 * (1 - (student * teacher).sum(dim=-1)).mean()


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
    same: Tensor | None = None,
) -> Tensor:
    """Let the similarities of the student's images and texts mimic the teacher's, a scalar.

    Affinity mimicking of TinyCLIP (Wu et al. 2023, eq. 3), see `_mimic`.
    """
    teacher = scale * teacher_image @ teacher_text.T
    student = scale * image @ text.T
    return (_mimic(student, teacher, same) + _mimic(student.T, teacher.T, same)) / 2


def interactive_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
    same: Tensor | None = None,
) -> Tensor:
    """Let the student's images find among the teacher's texts what the teacher's do, and texts so.

    Interactive contrastive learning of CLIP-KD (Yang et al. 2024, eq. 8), but with the teacher's
    own similarities as targets, see `_mimic`.
    """
    teacher = scale * teacher_image @ teacher_text.T
    images = _mimic(scale * image @ teacher_text.T, teacher, same)
    texts = _mimic(scale * text @ teacher_image.T, teacher.T, same)
    return (images + texts) / 2


def _mimic(student: Tensor, teacher: Tensor, same: Tensor | None) -> Tensor:
    """Return KL(teacher || student) of the softmax of each row of logits [N, N], averaged.

    A row counts as much as the teacher knows in it: its probability of what is right, the own
    column or any with an equal caption (`same`, bool [N, N]). The rest tells nothing about how
    image and text belong together, and fitting it at a scale of 100 costs the features.
    """
    with torch.no_grad():
        target = F.log_softmax(teacher, dim=-1)
        chance = target.exp()
        known = chance.diagonal() if same is None else (chance * same).sum(dim=-1)
    each = F.kl_div(F.log_softmax(student, dim=-1), target, reduction="none", log_target=True)
    return (known * each.sum(dim=-1)).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The weight of each loss; 0 leaves a loss out."""

    affinity: float = 1.0
    feature: float = 1.0
    interactive: float = 1.0
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        values = [getattr(self, field.name) for field in fields(self)]
        if not any(values) or not all(0 <= value < math.inf for value in values):
            raise ConfigError(f"loss weights must be >= 0 and not all 0, got {values}")


def distillation_losses(
    weights: LossWeights,
    *,
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: float,
    same: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return every weighted loss by name, and their weighted sum as `total`.

    `same` (bool [N, N]) tells which captions are equal; None if all differ.
    """
    ours, theirs = (image, text), (teacher_image, teacher_text)
    parts: dict[str, Tensor] = {}
    if weights.affinity:
        parts["affinity"] = affinity_loss(*ours, *theirs, scale, same)
    if weights.feature:
        parts["feature"] = (
            feature_loss(image, teacher_image) + feature_loss(text, teacher_text)
        ) / 2
    if weights.interactive:
        parts["interactive"] = interactive_loss(*ours, *theirs, scale, same)
    if weights.contrastive:
        parts["contrastive"] = contrastive_loss(image, text, scale, same)
    total = sum(
        (getattr(weights, name) * value for name, value in parts.items()),
        start=torch.zeros((), device=image.device),
    )
    return {"total": total, **parts}
