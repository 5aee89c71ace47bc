"""Embed a batch with the student, and hold it against what the teachers say of it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgeclip.compress.data.selection import best_of_each
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import CacheSettings
from edgeclip.compress.train.loss_terms import (
    TeacherRows,
    equal_captions,
    feature_loss,
    patch_loss,
)
from edgeclip.compress.train.losses import LossWeights, distillation_losses
from edgeclip.compress.train.text_bank import BankRows, TextBank
from edgeclip.compress.train.train_loop import Rows
from edgeclip.runtime.errors import InputError


def embed_batch(student: DualEncoder, inputs: Rows, *, patch_map: nn.Linear | None = None) -> Rows:
    """Embed the `pixels` (crops, uint8) and `ids` of a batch: `image` and `text`, [N, dim].

    With `hidden` (bool [N, squares, squares]) it embeds the pictures again, as `masked`, with these
    squares in the mean colour; with a map, it returns the mapped `patches` [N, count, width].
    """
    pixels = student.normalise(inputs["pixels"])
    if patch_map is None:
        found = {"image": student.embed_image(pixels)}
    else:
        image, patches = student.embed_image_and_patches(pixels)
        found = {"image": image, "patches": patch_map(patches).float()}
    if "hidden" in inputs:
        hidden = nn.functional.interpolate(inputs["hidden"][:, None].float(), pixels.shape[-2:])
        found["masked"] = student.embed_image(pixels * (1 - hidden))
    if "ids" in inputs:
        found["text"] = student.embed_text(inputs["ids"])
    return found


def most_learnable(candidates: int, found: Rows, targets: Rows) -> Tensor:
    """Return the row of each few candidates that the teacher knows best beside the student.

    See `selection`; a pair that cannot be read or has no caption is chosen last.
    """
    theirs = (targets["image 0"] * targets["text 0"]).sum(dim=-1)
    ours = (found["image"] * found["text"]).sum(dim=-1)
    scores = torch.where(targets["captioned"], theirs - ours, torch.nan)
    return best_of_each(scores, candidates)


def length_cuts(student: DualEncoder) -> tuple[Tensor, ...]:
    """Return what cuts an embedding to each shorter length: float32 [length, dim]."""
    basis = student.basis
    if basis is None:
        return ()
    axes = torch.from_numpy(basis.axes).to(student.device)
    return tuple(axes[:length] for length in basis.lengths[1:])


def batch_losses(
    weights: LossWeights,
    caches: Sequence[CacheSettings],
    bank: TextBank | None,
    cuts: Sequence[Tensor],
    found: Rows,
    targets: Rows,
) -> dict[str, Tensor]:
    """Return the named losses of a batch, and their weighted sum as `total`, each a scalar.

    Args:
        weights: the weight of each loss.
        caches: the settings of each teacher's cache; the student lives in the space of the first.
        bank: cached captions beside those of the batch; None for none.
        cuts: see `length_cuts`; the losses are their mean over the whole embeddings and each cut.
        found: what `embed_batch` returns.
        targets: those of `DistillationBatches`.

    Raises:
        InputError: no picture of the batch can be read any more.
    """
    rows = targets["readable"]
    if not rows.any():
        raise InputError("no picture of a whole batch can be read any more: see what became of it")
    if "text" in found:
        losses = _pair_losses(weights, caches, bank, cuts, found, targets)
    else:
        image, theirs = found["image"][rows], targets["image 0"][rows]
        lengths = (None, *cuts)
        each = [feature_loss(_cut(image, axes), _cut(theirs, axes)) for axes in lengths]
        losses = {"total": weights.feature * torch.stack(each).mean()}
    if "masked" in found:
        losses["masked"] = feature_loss(found["masked"][rows], targets["image 0"][rows])
    if "patches" in found:
        losses["patches"] = patch_loss(found["patches"][rows], targets["patches"][rows].float())
    for name in ("masked", "patches"):
        if name in losses:
            losses["total"] = losses["total"] + getattr(weights, name) * losses[name]
    return losses


def _pair_losses(
    weights: LossWeights,
    caches: Sequence[CacheSettings],
    bank: TextBank | None,
    cuts: Sequence[Tensor],
    found: Rows,
    targets: Rows,
) -> dict[str, Tensor]:
    """Return the losses of pictures with captions."""
    rows = targets["readable"]
    teachers = [
        TeacherRows(
            image=targets[f"image {number}"][rows],
            text=targets[f"text {number}"][rows],
            scale=own.logit_scale,
            bias=own.logit_bias,
        )
        for number, own in enumerate(caches)
    ]
    more = None
    if bank is not None:
        texts = [targets[f"bank {number}"] for number in range(len(caches))]
        new = BankRows(texts, targets["bank key"])
        more = bank.after(int(targets["bank position"][0]), new, targets["text number"])
        more = more.chosen(rows)
    image, text = found["image"][rows], found["text"][rows]
    captioned = targets["captioned"][rows]
    # Two translations of a caption are other tokens of the student, and one text of the teacher.
    texts_of = (targets[name][rows] for name in ("caption", "text number"))
    same = torch.stack([equal_captions(own) for own in texts_of]).any(dim=0)
    each = [
        distillation_losses(
            weights,
            image=_cut(image, axes),
            text=_cut(text, axes),
            teachers=[_cut_teacher(teachers[0], axes), *teachers[1:]],
            captioned=captioned,
            same=same,
            bank=more and replace(more, texts=[_cut(more.texts[0], axes), *more.texts[1:]]),
        )
        for axes in (None, *cuts)
    ]
    return {name: torch.stack([own[name] for own in each]).mean(dim=0) for name in each[0]}


def _cut(rows: Tensor, axes: Tensor | None) -> Tensor:
    """Cut embeddings by axes, and make their length 1 again; without axes they stay whole."""
    return rows if axes is None else nn.functional.normalize(rows @ axes.T, dim=-1)


def _cut_teacher(rows: TeacherRows, axes: Tensor | None) -> TeacherRows:
    """Cut the embeddings of the first teacher; of others no axes are known."""
    return replace(rows, image=_cut(rows.image, axes), text=_cut(rows.text, axes))
