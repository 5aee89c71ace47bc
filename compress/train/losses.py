"""Weigh and add the losses of distillation, see `loss_terms` for each with its paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from edgeclip.compress.data.selection import Selection
from edgeclip.compress.train.loss_terms import (
    Bank,
    RowWeights,
    TeacherRows,
    affinity_loss,
    contrastive_loss,
    feature_loss,
    hard_negative_loss,
    interactive_loss,
    logit_loss,
    orthogonality_loss,
    relational_loss,
    sigmoid_loss,
    vertical_loss,
)
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError

# In the order in which they are computed and logged.
TERMS = (
    "feature",
    "affinity",
    "interactive",
    "contrastive",
    "hard_negatives",
    "sigmoid",
    "logits",
    "relational",
    "vertical",
    "orthogonality",
    "masked",
    "patches",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The weight of each loss, 0 to leave it out, and what they depend on.

    Args:
        affinity, feature, interactive, contrastive, hard_negatives, sigmoid, logits, relational,
            vertical, orthogonality, masked, patches: the weights, see the function of that name in
            `loss_terms`; `masked` is the feature loss of pictures with a part of them hidden
            (masked feature distillation, CLIP-KD, Yang et al. 2024).
        affinity_scale: a factor on the logit scale of each teacher in the affinity loss: one for
            all, or one for each.
        row_weights, row_focus: how much each row of the affinity and interactive losses counts, see
            `RowWeights`.
        bank: number of cached captions beside those of the batch, which are further columns of the
            losses between a picture and texts, and of the vertical one; 0 for none.
        hard_count: number of hard negatives of each picture.
        logit_temperature: of the logit loss.
        mask_share: share of a picture that the masked loss hides.
        selection: how each pair is chosen of `candidates`, see `selection`; `none` takes all.
        candidates: number of pairs that each one is chosen of.
    """

    affinity: Annotated[float, Ge(0)] = 1.0
    feature: Annotated[float, Ge(0)] = 10.0
    interactive: Annotated[float, Ge(0)] = 1.0
    contrastive: Annotated[float, Ge(0)] = 0.0
    hard_negatives: Annotated[float, Ge(0)] = 0.0
    sigmoid: Annotated[float, Ge(0)] = 0.0
    logits: Annotated[float, Ge(0)] = 0.0
    relational: Annotated[float, Ge(0)] = 0.0
    vertical: Annotated[float, Ge(0)] = 0.0
    orthogonality: Annotated[float, Ge(0)] = 0.0
    masked: Annotated[float, Ge(0)] = 0.0
    patches: Annotated[float, Ge(0)] = 0.0
    affinity_scale: tuple[float, ...] = (1.0,)
    row_weights: Literal["known", "equal"] = "known"
    row_focus: Annotated[float, Ge(0)] = 0.0
    bank: Annotated[int, Ge(0)] = 0
    hard_count: Annotated[int, Ge(1)] = 8
    logit_temperature: Annotated[float, Gt(0)] = 2.0
    mask_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    selection: Selection = "none"
    candidates: Annotated[int, Ge(2)] = 4

    def __post_init__(self) -> None:
        try:
            check_bounds(self)
        except ValueError as error:
            raise ConfigError(f"weights of losses: {error}") from error
        if not any(getattr(self, name) for name in TERMS):
            raise ConfigError("the weights of all losses are 0, so there is nothing to learn")
        if not self.affinity_scale or not all(0 < own < math.inf for own in self.affinity_scale):
            raise ConfigError(
                f"affinity_scale must be one factor above 0, or one for each teacher, got "
                f"{' '.join(map(str, self.affinity_scale)) or 'none'}"
            )

    def check(self, biases: Sequence[float | None]) -> None:
        """Refuse what teachers of these logit biases, None for one without, cannot teach.

        Raises:
            ConfigError: the message says what to leave out.
        """
        if len(self.affinity_scale) not in (1, len(biases)):
            raise ConfigError(
                f"--affinity-scale has {len(self.affinity_scale)} factors for {len(biases)} "
                "teachers: give one for all, or one for each"
            )
        if self.sigmoid and biases[0] is None:
            raise ConfigError(
                "--sigmoid needs a teacher with a logit bias, such as a SigLIP: leave it out, or "
                "take --logits"
            )
        if self.logits and len({own is None for own in biases}) > 1:
            raise ConfigError(
                "--logits cannot average a teacher that answers with a softmax and a SigLIP: leave "
                "it out, or choose teachers of one kind"
            )
        if self.selection == "learnable" and self.bank:
            raise ConfigError(
                "--selection learnable and --bank do not go together: leave one out, or choose "
                "--selection known"
            )


def distillation_losses(
    weights: LossWeights,
    *,
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    captioned: Tensor | None = None,
    same: Tensor | None = None,
    bank: Bank | None = None,
) -> dict[str, Tensor]:
    """Return every weighted loss of embeddings by name, and their weighted sum as `total`.

    Args:
        weights: the weight of each loss.
        image, text: the student's embeddings.
        teachers: at least one; the student lives in the space of the first.
        captioned: which pictures have a caption, bool [N]; the text rows of the others mean
            nothing, and their image rows learn by the feature loss alone. None for all.
        same: which captions are equal, bool [N, N]; None if all differ.
        bank: more captions than those of the batch, for the losses that take them.
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
    parts |= _between_towers(
        weights, image, text, pairs, same, None if bank is None else bank.chosen(captioned)
    )
    parts |= _within_towers(weights, image, text, pairs, bank)
    total = sum(
        (getattr(weights, name) * value for name, value in parts.items()),
        start=torch.zeros((), device=image.device),
    )
    return {"total": total, **parts}


def _between_towers(
    weights: LossWeights,
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    same: Tensor | None,
    bank: Bank | None,
) -> dict[str, Tensor]:
    """Return the losses that compare pictures with texts."""
    first = teachers[0]
    more = None if bank is None else bank.cosines(image, teachers)
    rows = RowWeights(by=weights.row_weights, focus=weights.row_focus)
    parts: dict[str, Tensor] = {}
    if weights.affinity:
        factors = weights.affinity_scale * (len(teachers) // len(weights.affinity_scale))
        scaled = [
            replace(own, scale=factor * own.scale)
            for own, factor in zip(teachers, factors, strict=True)
        ]
        parts["affinity"] = affinity_loss(image, text, scaled, same, bank=more, rows=rows)
    if weights.interactive:
        parts["interactive"] = interactive_loss(image, text, teachers, same, bank=more, rows=rows)
    if weights.contrastive:
        parts["contrastive"] = contrastive_loss(image, text, first.scale, same, more)
    if weights.hard_negatives:
        parts["hard_negatives"] = hard_negative_loss(
            image, text, first, same, bank=more, count=weights.hard_count
        )
    if weights.sigmoid and first.bias is not None:
        parts["sigmoid"] = sigmoid_loss(image, text, first.scale, first.bias, same, more)
    if weights.logits:
        parts["logits"] = logit_loss(
            image, text, teachers, temperature=weights.logit_temperature, bank=more
        )
    return parts


def _within_towers(
    weights: LossWeights,
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    bank: Bank | None,
) -> dict[str, Tensor]:
    """Return the losses that compare rows of one tower, each the mean of both towers."""
    first = teachers[0]
    scales = [own.scale for own in teachers]
    parts: dict[str, Tensor] = {}
    if weights.relational:
        images = relational_loss(image, [own.image for own in teachers], scales)
        texts = relational_loss(text, [own.text for own in teachers], scales)
        parts["relational"] = (images + texts) / 2
    if weights.vertical:
        images = vertical_loss(image, first.image, first.scale)
        more = None if bank is None else bank.texts[0]
        parts["vertical"] = (images + vertical_loss(text, first.text, first.scale, more)) / 2
    if weights.orthogonality:
        images = orthogonality_loss(image, first.image)
        parts["orthogonality"] = (images + orthogonality_loss(text, first.text)) / 2
    return parts
