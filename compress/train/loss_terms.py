"""Losses of distillation and contrastive training; all take L2-normalised embeddings.

Shapes: image and text embeddings are float [N, dim], row i of each is one pair.

The targets between image and text are soft: the teacher's own similarities (TinyCLIP's affinity
mimicking, MobileCLIP's distillation loss). A one-hot target, "the own caption and no other", is
one that the teacher itself misses wherever it does not know the pictures. Its gradient at the
teacher's own embeddings is scale (P - I) T for the teacher's probabilities P and texts T, which is
not 0 and, at a logit scale of 100, many times that of the feature loss: the student is pulled out
of the teacher's space. With soft targets a loss is 0, and so is its gradient, where student and
teacher are equal. This holds for all but the three that know labels: contrastive, hard negatives
and sigmoid.

A bank holds the teacher's embeddings of more captions than those of the batch. They are further
columns beside the batch's texts, with a teacher that is frozen they never grow old (a queue as in
MoCo, He et al. 2020, without its momentum encoder).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """A teacher's embeddings of a batch: image and text float [N, dim], and its logit scale.

    `bias` is the logit bias of a SigLIP, None for a teacher that answers with a softmax.
    """

    image: Tensor
    text: Tensor
    scale: float
    bias: float | None = None

    def chosen(self, rows: Tensor) -> "TeacherRows":
        """Return the rows of a mask, bool [N]."""
        return replace(self, image=self.image[rows], text=self.text[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class BankCosines:
    """Cosines of each picture of a batch to each text of a bank, float [N, M].

    Attributes:
        student: of the student's pictures to the first teacher's texts.
        teachers: of each teacher's pictures to its own texts.
        same: which texts are the picture's own caption, bool [N, M].
    """

    student: Tensor
    teachers: Sequence[Tensor]
    same: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Captions beside those of the batch: each teacher's embeddings of them, float [M, dim].

    `same` tells which are the caption of which picture, bool [N, M].
    """

    texts: Sequence[Tensor]
    same: Tensor

    def chosen(self, rows: Tensor) -> "Bank":
        """Return the same texts for the pictures of a mask, bool [N]."""
        return replace(self, same=self.same[rows])

    def cosines(self, image: Tensor, teachers: Sequence[TeacherRows]) -> BankCosines:
        """Compare the student's pictures, float [N, dim], and each teacher's with the texts."""
        with torch.no_grad():
            theirs = [own.image @ texts.T for own, texts in zip(teachers, self.texts, strict=True)]
        return BankCosines(student=image @ self.texts[0].T, teachers=theirs, same=self.same)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """How much each row of an affinity or interactive loss counts.

    Attributes:
        by: `known`, as much as the teacher gives to what is right, or `equal`, as published
            (the contrastive relational distillation, CRD, of CLIP-KD, Yang et al. 2024, is the
            affinity loss with equal rows).
        focus: the exponent g of a factor (1 - p)^g, for the chance p that the student gives to what
            is right: a row counts more, the more wrong the student is (focal loss, Lin et al. 2017,
            eq. 4). 0 for none.
    """

    by: Literal["known", "equal"] = "known"
    focus: float = 0.0


_KNOWN = RowWeights()


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    same: Tensor | None = None,
    bank: BankCosines | None = None,
) -> Tensor:
    """Return the symmetric InfoNCE loss over the batch, a scalar (CLIP, Radford et al. 2021).

    `same` (bool [N, N]) tells which pairs have an equal caption: each of them is as right as the
    own one (Khosla et al. 2020, eq. 2). None if all captions differ. The texts of a bank are
    further wrong ones for each picture, but those that are its own caption, which are left out.
    """
    logits = scale * image @ text.T
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    target = same / same.sum(dim=-1, keepdim=True)  # symmetric, as `same` is in equal rows
    texts = logits
    target_texts = target
    if bank is not None:
        wrong = (scale * bank.student).masked_fill(bank.same, torch.finfo(logits.dtype).min)
        texts = torch.cat([logits, wrong], dim=-1)
        target_texts = F.pad(target, (0, wrong.shape[1]))
    return (F.cross_entropy(texts, target_texts) + F.cross_entropy(logits.T, target)) / 2


def equal_captions(keys: Tensor) -> Tensor:
    """Tell which captions are equal: a number of each caption, int64 [N], to bool [N, N]."""
    return keys[:, None] == keys


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 5 (1 - cos) between matching rows: feature distillation, a scalar.

    It is the mean squared error of CLIP-KD (Yang et al. 2024, FD) too: rows of length 1 have
    |s - t|^2 = 2 (1 - cos), so that this is 2.5 times their squared distance.
    """
    return 5 * (1 - (student * teacher).sum(dim=-1)).mean()


def affinity_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    same: Tensor | None = None,
    *,
    bank: BankCosines | None = None,
    rows: RowWeights = _KNOWN,
) -> Tensor:
    """Let the similarities of the student's images and texts mimic the teachers', a scalar.

    Affinity mimicking of TinyCLIP (Wu et al. 2023, eq. 3), see `_mimic`. Several teachers, each at
    its own scale, are averaged after the softmax (MobileCLIP, Vasu et al. 2024, sec. 4); the
    student answers at the scale of the first.
    """
    scale = teachers[0].scale
    logits = scale * image @ text.T
    to_texts, to_images = _log_probabilities(teachers, bank)
    texts = _beside(logits, bank, scale)
    return (
        _mimic(texts, to_texts, same, bank, rows) + _mimic(logits.T, to_images, same, None, rows)
    ) / 2


def interactive_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    same: Tensor | None = None,
    *,
    bank: BankCosines | None = None,
    rows: RowWeights = _KNOWN,
) -> Tensor:
    """Let the student's images find among the teacher's texts what the teacher's do, and texts so.

    Interactive contrastive learning of CLIP-KD (Yang et al. 2024, eq. 8), but with the teachers'
    own similarities as targets, see `_mimic`. The texts are those of the first teacher, in whose
    space the student lives.
    """
    first = teachers[0]
    to_texts, to_images = _log_probabilities(teachers, bank)
    found = _beside(first.scale * image @ first.text.T, bank, first.scale)
    images = _mimic(found, to_texts, same, bank, rows)
    texts = _mimic(first.scale * text @ first.image.T, to_images, same, None, rows)
    return (images + texts) / 2


def _log_probabilities(
    teachers: Sequence[TeacherRows], bank: BankCosines | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the teachers' mean chances: of each image's texts, and of texts."""
    with torch.no_grad():
        logits = [own.scale * own.image @ own.text.T for own in teachers]
        to_images = _mean_chance([own.T for own in logits])
        if bank is not None:
            logits = [
                torch.cat([inside, own.scale * beside], dim=-1)
                for own, inside, beside in zip(teachers, logits, bank.teachers, strict=True)
            ]
        return _mean_chance(logits), to_images


def _mean_chance(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean over teachers of the softmax of each row."""
    found = [F.log_softmax(own, dim=-1) for own in logits]
    if len(found) == 1:
        return found[0]
    return torch.stack(found).logsumexp(dim=0) - math.log(len(found))


def _beside(logits: Tensor, bank: BankCosines | None, scale: float) -> Tensor:
    """Put the student's logits of the bank's texts behind those of the batch's."""
    return logits if bank is None else torch.cat([logits, scale * bank.student], dim=-1)


def _mimic(
    student: Tensor,
    target: Tensor,
    same: Tensor | None,
    bank: BankCosines | None,
    rows: RowWeights,
) -> Tensor:
    """Return KL(target || student) of the softmax of each row of logits [N, N + M], averaged.

    `target` holds logarithms of chances. By default a row counts as much as the teacher knows in
    it: its probability of what is right, the own column or any with an equal caption (`same`, bool
    [N, N], and the bank's). The rest tells nothing about how image and text belong together, and
    fitting it at a scale of 100 costs the features.
    """
    found = F.log_softmax(student, dim=-1)
    with torch.no_grad():
        chance = target.exp()
        weight = torch.ones_like(chance[:, 0])
        if rows.by == "known":
            weight = _of_right(chance, same, bank)
        if rows.focus:
            wrong = 1 - _of_right(found.exp(), same, bank)
            weight = weight * wrong.clamp(min=0) ** rows.focus
    return (weight * (chance * (target - found)).sum(dim=-1)).mean()


def _of_right(chance: Tensor, same: Tensor | None, bank: BankCosines | None) -> Tensor:
    """Sum what each row [N, N + M] gives to its own column and those of an equal caption."""
    count = len(chance)
    inside = chance[:, :count]
    found = inside.diagonal() if same is None else (inside * same).sum(dim=-1)
    return found if bank is None else found + (chance[:, count:] * bank.same).sum(dim=-1)


def relational_loss(student: Tensor, teachers: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Let the rows of one tower be as near to one another as the teachers' are, a scalar.

    KL(teacher || student) of the softmax of each row's similarities to all others of its tower:
    relational distillation (Park et al. 2019) with similarities as the potential, compared as
    distributions, as CLIP-KD's CRD does between the towers (Yang et al. 2024). It does not see how
    the space lies: a rotation of all the student's rows changes nothing.

    Args:
        student: rows of a tower, float [N, dim].
        teachers, scales: the rows of each teacher, float [N, its dim], and its logit scale; several
            are averaged after the softmax, and the student answers at the scale of the first.
    """
    if len(student) < 2:
        return 0 * student.sum()
    with torch.no_grad():
        target = _mean_chance(
            [_off_diagonal(s * own @ own.T) for own, s in zip(teachers, scales, strict=True)]
        )
    found = F.log_softmax(_off_diagonal(scales[0] * student @ student.T), dim=-1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


def _off_diagonal(square: Tensor) -> Tensor:
    """Return a matrix [N, N] without its diagonal: [N, N - 1]."""
    count = len(square)
    rest = square.flatten()[1:].view(count - 1, count + 1)[:, :-1]
    return rest.reshape(count, count - 1)


def vertical_loss(
    student: Tensor, teacher: Tensor, scale: float, bank: Tensor | None = None
) -> Tensor:
    """Let each row be as near to the teacher's rows of its tower as the teacher's own is, a scalar.

    KL(teacher || student) of the softmax over the teacher's rows, as in SEED (Fang et al. 2021,
    sec. 3.2). The vertical relation, student to teacher in one tower, is that of CLIP-RD (Chung et
    al. 2026, arXiv 2603.25383); the target here is the teacher's own relation, and not that of the
    other tower, so that nothing pulls a student that equals its teacher.

    Args:
        student, teacher: matching rows of a tower, float [N, dim].
        scale: the teacher's logit scale.
        bank: further rows of the teacher, float [M, dim].
    """
    others = teacher if bank is None else torch.cat([teacher, bank])
    with torch.no_grad():
        target = F.log_softmax(scale * teacher @ others.T, dim=-1)
    found = F.log_softmax(scale * student @ others.T, dim=-1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


def hard_negative_loss(
    image: Tensor,
    text: Tensor,
    teacher: TeacherRows,
    same: Tensor | None = None,
    *,
    bank: BankCosines | None = None,
    count: int = 8,
) -> Tensor:
    """Tell each picture's caption from those that the teacher finds hardest to tell, a scalar.

    InfoNCE from images to texts with the `count` wrong texts that the teacher puts nearest to the
    picture, in the batch and the bank. Each is weighted by exp(scale x the teacher's cosine), in
    the mean 1 (Robinson et al. 2021, sec. 3, with the teacher's score for the student's). Equal
    captions are no negatives, nor are texts that the teacher puts at least as near as the own one:
    they may be right as well (positive-aware mining, Moreira et al. 2024). A picture
    without any negative counts as 0.
    """
    ours, theirs = image @ text.T, teacher.image @ teacher.text.T
    if same is None:
        same = torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    own, limit = ours.diagonal()[:, None], theirs.diagonal()[:, None]
    if bank is not None:
        ours = torch.cat([ours, bank.student], dim=-1)
        theirs = torch.cat([theirs, bank.teachers[0]], dim=-1)
        same = torch.cat([same, bank.same], dim=-1)
    with torch.no_grad():
        wrong = theirs.masked_fill(same | (theirs >= limit), -math.inf)
        score, place = wrong.topk(min(count, wrong.shape[1]), dim=-1)
        number = score.isfinite().sum(dim=-1, keepdim=True)
        weight = F.log_softmax(teacher.scale * score, dim=-1) + number.log()
        weight = weight.nan_to_num(nan=-math.inf)  # of a picture without negatives
    hard = teacher.scale * ours.gather(1, place) + weight
    rivals = torch.cat([teacher.scale * own, hard], dim=-1)
    return (rivals.logsumexp(dim=-1) - rivals[:, 0]).mean()


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float,
    same: Tensor | None = None,
    bank: BankCosines | None = None,
) -> Tensor:
    """Judge each picture with each text as a yes or no of its own, a scalar.

    The loss of SigLIP (Zhai et al. 2023, algorithm 1): the sum over texts of
    -log sigmoid(z (scale x cos + bias)), z = 1 for the own or an equal caption and -1 for others,
    averaged over pictures. The texts of a bank count as those of the batch.
    """
    if same is None:
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
    each = -F.logsigmoid(torch.where(same, 1.0, -1.0) * (scale * image @ text.T + bias))
    loss = each.sum(dim=-1).mean()
    if bank is not None:
        sign = torch.where(bank.same, 1.0, -1.0)
        loss = loss - F.logsigmoid(sign * (scale * bank.student + bias)).sum(dim=-1).mean()
    return loss


def logit_loss(
    image: Tensor,
    text: Tensor,
    teachers: Sequence[TeacherRows],
    *,
    temperature: float,
    bank: BankCosines | None = None,
) -> Tensor:
    """Distil the teacher's logits, divided by a temperature T, a scalar.

    T^2 KL(teacher || student) of the softmax of each row, over images and texts (Hinton et al.
    2015, sec. 2). Its classes are the texts of the batch, and those of the bank. A teacher with a
    bias answers each pair with a sigmoid: there it is the KL divergence of these chances, summed
    over texts. Every row counts the same. Several teachers are averaged after softmax or sigmoid.
    """
    first = teachers[0]
    soft = [replace(own, scale=own.scale / temperature) for own in teachers]
    scale = soft[0].scale
    logits = scale * image @ text.T
    texts = _beside(logits, bank, scale)
    if first.bias is None:
        to_texts, to_images = _log_probabilities(soft, bank)
        equal = RowWeights(by="equal")
        loss = _mimic(texts, to_texts, None, bank, equal)
        loss = (loss + _mimic(logits.T, to_images, None, None, equal)) / 2
        return temperature**2 * loss
    with torch.no_grad():
        chance = torch.stack([_yes(own, bank, n, temperature) for n, own in enumerate(soft)])
        chance = chance.mean(dim=0)
        least = -torch.xlogy(chance, chance) - torch.xlogy(1 - chance, 1 - chance)
    answer = texts + first.bias / temperature
    each = F.binary_cross_entropy_with_logits(answer, chance, reduction="none") - least
    return temperature**2 * each.sum(dim=-1).mean()


def _yes(teacher: TeacherRows, bank: BankCosines | None, number: int, temperature: float) -> Tensor:
    """Return the chance that a SigLIP gives to each picture with each text, [N, N + M]."""
    logits = teacher.scale * teacher.image @ teacher.text.T
    if bank is not None:
        logits = torch.cat([logits, teacher.scale * bank.teachers[number]], dim=-1)
    return torch.sigmoid(logits + (teacher.bias or 0.0) / temperature)


def orthogonality_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Let two dimensions of the student be no more correlated than the teacher's, a scalar.

    The covariance term of VICReg (Bardes et al. 2022, eq. 3 and 4): the sum of the squares of the
    covariances of different dimensions, over the batch, divided by the number of dimensions. There
    the target is 0, orthogonal dimensions; here it is the teacher's own covariance of the same
    rows, which is as near to 0 as the space allows.
    """
    if len(student) < 2:
        return 0 * student.sum()
    difference = _off_diagonal(torch.cov(student.T) - torch.cov(teacher.T))
    return difference.square().sum() / student.shape[1]


def patch_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cos between matching patches, a scalar.

    Both are float [N, patches, width], not normalised. All patches of a picture are visible, and
    each of them counts: it is what improves patch features in TIPSv2 (Cao et al. 2026,
    arXiv 2604.12012), which compares distributions over prototypes where this compares features.
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
