"""Losses of distillation and contrastive training; all take L2-normalised embeddings.

Shapes: image and text embeddings are float [N, dim], row i of each is one pair.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeclip.runtime.errors import ConfigError


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Return the symmetric InfoNCE loss over the batch, a scalar (CLIP, Radford et al. 2021)."""
    logits = scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 5 (1 - cos) between matching rows: feature distillation, a scalar."""
    return 5 * (1 - (student * teacher).sum(dim=-1)).mean()


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Return KL(teacher || student) of the similarity rows, averaged over both directions.

    Affinity mimicking of TinyCLIP (Wu et al. 2023, eq. 3): softmax of each row of the
    image-text similarity, both matrices at the teacher's logit scale.
    """
    student = scale * image @ text.T
    with torch.no_grad():
        teacher = scale * teacher_image @ teacher_text.T

    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        return F.kl_div(
            F.log_softmax(ours, dim=-1),
            F.log_softmax(theirs, dim=-1),
            reduction="batchmean",
            log_target=True,
        )

    return (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2


def interactive_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Contrast the student's images with the teacher's texts, and texts with images.

    Interactive contrastive learning of CLIP-KD (Yang et al. 2024, eq. 8).
    """
    size = len(image)
    target = torch.arange(size, device=image.device)
    return (
        F.cross_entropy(scale * image @ teacher_text.T, target)
        + F.cross_entropy(scale * text @ teacher_image.T, target)
    ) / 2


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
) -> dict[str, Tensor]:
    """Return every weighted loss by name, and their weighted sum as `total`."""
    ours, theirs = (image, text), (teacher_image, teacher_text)
    parts: dict[str, Tensor] = {}
    if weights.affinity:
        parts["affinity"] = affinity_loss(*ours, *theirs, scale)
    if weights.feature:
        parts["feature"] = (
            feature_loss(image, teacher_image) + feature_loss(text, teacher_text)
        ) / 2
    if weights.interactive:
        parts["interactive"] = interactive_loss(*ours, *theirs, scale)
    if weights.contrastive:
        parts["contrastive"] = contrastive_loss(image, text, scale)
    total = sum(
        (getattr(weights, name) * value for name, value in parts.items()),
        start=torch.zeros((), device=image.device),
    )
    return {"total": total, **parts}
