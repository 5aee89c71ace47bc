"""Distil a student: train it to reproduce the teacher's cached embeddings."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.compute import fused_attention
from edgeclip.compress.data.augmentation import view_crop
from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.selection import Selection, best_of_each
from edgeclip.compress.data.sources import Source, seed_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import CacheSettings, TeacherCache, spread_rows
from edgeclip.compress.train.held_out import HeldOut
from edgeclip.compress.train.kept_weights import BestStep, Validation
from edgeclip.compress.train.loss_terms import (
    TeacherRows,
    equal_captions,
    feature_loss,
    patch_loss,
)
from edgeclip.compress.train.losses import LossWeights, distillation_losses
from edgeclip.compress.train.text_bank import BankReader, BankRows, TextBank
from edgeclip.compress.train.train_loop import (
    Batch,
    BatchPart,
    Rows,
    TrainSettings,
    TrainTask,
    train,
)
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad, report_bad

_log = logging.getLogger(__name__)

_SQUARES = 8  # squares on a side of a picture, each of which the masked loss shows or hides
_OF_MASKS = 0x3A5C  # so that no other use of the seed draws the same numbers
_TRAINED_PER_HELD_OUT = 4  # pictures to train on, at least, for each that is validated


def distill(
    student: DualEncoder,
    caches: TeacherCache | Sequence[TeacherCache],
    source: Source,
    *,
    loss_weights: LossWeights,
    settings: TrainSettings,
    out: Path,
    held_out: int | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
    start: str = "",
    begin: Callable[[], None] = lambda: None,
) -> BestStep | None:
    """Train `student` in place; write checkpoints and `log.jsonl` to `out`.

    `held_out` pictures (default: see `Sampling`) are not trained on: on them student and teacher
    are compared while training goes on, and the student ends as it was where they agreed best.
    Returns that step; None if nothing is held out.

    With `student.basis` the losses are the mean of those of the full embeddings and those of each
    length that it cuts to (Matryoshka representation learning, Kusupati et al., NeurIPS 2022),
    student and first teacher cut alike; other teachers' similarities stay those of their space.

    Pictures without captions train the image tower alone, by the feature loss. If none has a
    caption, the text tower is frozen. It should be the teacher's unmodified text tower; this is
    not checked here.

    Args:
        caches: the embeddings of one teacher or several; the student lives in the space of the
            first. See `affinity_loss` for what the others do.
        start: names the model that the student was, if it is no part of the teacher; resuming with
            another is refused.
        begin: see `TrainTask`.

    Raises:
        ConfigError: a cache was made from other data than `source`, the student's embeddings have
            another length than the first teacher's, nothing teaches pictures without captions, or
            a loss is one that the teachers cannot teach.
    """
    caches = [caches] if isinstance(caches, TeacherCache) else list(caches)
    first = caches[0].settings
    for cache in caches:
        if cache.settings.source != source.identity:
            raise ConfigError(f"the teacher cache was made from other data than {source.name}")
    if first.dim != student.spec.dim:
        raise ConfigError(
            f"the teacher embeds to {first.dim} numbers, the student to "
            f"{student.spec.dim}: they must share one space"
        )
    if len({(own.settings.views, own.settings.augmentation) for own in caches}) > 1:
        raise ConfigError(
            "the teachers' caches hold other views of the pictures: make them with the same --views"
        )
    loss_weights.check([own.settings.logit_bias for own in caches])
    if not first.captions:
        if loss_weights.selection != "none":
            raise ConfigError("--selection needs captions, which these pictures have not")
        if not loss_weights.feature:
            raise ConfigError(
                f"{source.name}: pictures without captions learn by --feature alone, whose weight "
                "is 0: choose one above 0"
            )
        prefixes = student.tower_parts("text")
        for name, weight in student.named_parameters():
            weight.requires_grad_(weight.requires_grad and not name.startswith(prefixes))
    sampling = Sampling(parts_of(source), seed=settings.seed, held_out=held_out)
    if settings.batch_size > sampling.train_count:
        _log.warning(
            "a batch of %d is more than the %d pictures to train on, and holds them several times: "
            "choose a smaller --batch-size",
            settings.batch_size,
            sampling.train_count,
        )
    patch_map = _patch_map(student, caches[0], loss_weights, settings.seed)
    hide = loss_weights.mask_share if loss_weights.masked else 0.0
    reader = _bank_reader(loss_weights.bank, caches, sampling, settings.batch_size)
    bank = None if reader is None else TextBank(reader, student.device)
    validate = None
    if len(sampling.held_out):
        validate = _Later(
            lambda: HeldOut(student, caches[0], source, sampling.held_out, compute=settings.compute)
        )
    else:
        _log.info(
            "none of %d pictures is held out, so nothing tells whether student and teacher agree "
            "on others",
            len(source),
        )
    switch_off_dropout(student)
    if settings.gradient_checkpointing:
        student.checkpoint_gradients()
    seldom = _TRAINED_PER_HELD_OUT * len(sampling.held_out) // settings.batch_size
    task = TrainTask(
        title="distill",
        module=student if patch_map is None else _Taught(student, patch_map),
        batch=DistillationBatches(
            student,
            caches,
            source,
            sampling,
            settings,
            bank=reader,
            hide=hide,
            patches=0 if patch_map is None else _patches_of(student)[0],
            selection=loss_weights.selection,
            candidates=loss_weights.candidates,
        ),
        embed=partial(embed_batch, student, patch_map=patch_map),
        losses=partial(
            _losses, loss_weights, [own.settings for own in caches], bank, _cuts(student)
        ),
        identity=_identity(student, caches, loss_weights, source, len(sampling.held_out), start),
        begin=begin,
        validate=validate,
        validate_every=seldom,
        note_bad=_BadPictures(len(source), max_bad),
        choose=(
            partial(most_learnable, loss_weights.candidates)
            if loss_weights.selection == "learnable"
            else None
        ),
    )
    with fused_attention(student.model, student.device):
        return train(task, settings, out)


def _bank_reader(
    wanted: int, caches: Sequence[TeacherCache], sampling: Sampling, batch_size: int
) -> BankReader | None:
    """Return what reads the captions of a bank; None if none is wanted.

    Raises:
        ConfigError: there are no captions, or none beside those of a batch.
    """
    if not wanted:
        return None
    if not caches[0].settings.captions:
        raise ConfigError("--bank needs captions, which these pictures have not: leave it out")
    size = min(wanted, sampling.train_count - batch_size)
    if size < 1:
        raise ConfigError(
            f"a batch of {batch_size} leaves none of {sampling.train_count} captions for the "
            "--bank: choose a smaller --batch-size, or leave it out"
        )
    if size < wanted:
        _log.info("the bank holds the %d captions that a batch leaves of all", size)
    return BankReader(caches, sampling, size)


def switch_off_dropout(module: nn.Module) -> None:
    """Leave no activation to chance, so that the parts of a batch and its whole give the same.

    A student is taught what its teacher answers without dropout; BERT's towers have some.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


class _Later:
    """Makes a validation when it is first asked for, which the first process alone is."""

    def __init__(self, make: Callable[[], HeldOut]) -> None:
        self._make = make
        self._made: HeldOut | None = None

    def __call__(self) -> Validation:
        self._made = self._made or self._make()
        return self._made()


class _Taught(nn.Module):
    """A student with the map that is trained beside it, and is no part of it when it is saved."""

    def __init__(self, student: DualEncoder, patch_map: nn.Linear) -> None:
        super().__init__()
        self.student = student
        self.patch_map = patch_map


def _patch_map(
    student: DualEncoder, cache: TeacherCache, weights: LossWeights, seed: int
) -> nn.Linear | None:
    """Return a map from the student's patches to the teacher's; None without a loss of them.

    Raises:
        ConfigError: the cache holds no patches.
    """
    if not weights.patches:
        return None
    if not cache.has_patches:
        raise ConfigError("--patches needs a teacher cache that was opened with patches")
    readable = next(own for own in range(cache.settings.count) if own not in cache.unreadable)
    theirs = cache.patches([readable]).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(_patches_of(student)[1], theirs).to(student.device)


def _patches_of(student: DualEncoder) -> tuple[int, int]:
    """Return how many patches the student's image tower has, and their width."""
    size = student.image_spec.size
    was_training = student.training
    student.eval()
    with torch.inference_mode():
        black = torch.zeros(1, 3, size, size, device=student.device)
        _, count, width = student.embed_image_and_patches(black)[1].shape
    student.train(was_training)
    return count, width


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


def _cuts(student: DualEncoder) -> tuple[Tensor, ...]:
    """Return what cuts an embedding to each shorter length: float32 [length, dim]."""
    basis = student.basis
    if basis is None:
        return ()
    axes = torch.from_numpy(basis.axes).to(student.device)
    return tuple(axes[:length] for length in basis.lengths[1:])


def _cut(rows: Tensor, axes: Tensor | None) -> Tensor:
    """Cut embeddings by axes, and make their length 1 again; without axes they stay whole."""
    return rows if axes is None else nn.functional.normalize(rows @ axes.T, dim=-1)


def _cut_teacher(rows: TeacherRows, axes: Tensor | None) -> TeacherRows:
    """Cut the embeddings of the first teacher; of others no axes are known."""
    return replace(rows, image=_cut(rows.image, axes), text=_cut(rows.text, axes))


def _losses(
    weights: LossWeights,
    caches: Sequence[CacheSettings],
    bank: TextBank | None,
    cuts: Sequence[Tensor],
    found: Rows,
    targets: Rows,
) -> dict[str, Tensor]:
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
    captioned, same = targets["captioned"][rows], equal_captions(targets["caption"][rows])
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


class DistillationBatches:
    """Make the batch of each step, or a part of it, in any process.

    It depends only on seed and step, so a resumed run sees the same batches. Epoch e of a picture
    uses the augmented view number e mod (number of cached views), and the caption number e mod
    (number of its captions). A picture that cannot be read, or has no caption, keeps its row, which
    the losses leave out.

    Args:
        student: makes the inputs.
        caches: the embeddings of each teacher.
        source: the pairs.
        sampling: which pairs each step takes.
        settings: the size of a batch.
        bank: reads the captions that the bank takes in with each batch; None for no bank.
        hide: share of each picture that is hidden for the masked loss; 0 for no such loss.
        patches: number of the student's patches, to which the first teacher's are resampled; 0 for
            none of them.
        selection, candidates: how the pairs are chosen of how many, see `selection`. With
            `learnable` a part holds all candidates.
    """

    def __init__(
        self,
        student: DualEncoder,
        caches: Sequence[TeacherCache],
        source: Source,
        sampling: Sampling,
        settings: TrainSettings,
        *,
        bank: BankReader | None = None,
        hide: float = 0.0,
        patches: int = 0,
        selection: Selection = "none",
        candidates: int = 1,
    ) -> None:
        # The student itself is not kept: a worker process gets a copy of this object.
        self._spec, self._tokenizer = student.image_spec, student.text_tokenizer
        self._caches, self._source, self._sampling = caches, source, sampling
        # One may have become unreadable between the caches of two teachers.
        self._unreadable = {index for cache in caches for index in cache.unreadable}
        self._batch_size = settings.batch_size
        self._seed, self._selection = settings.seed, selection
        self._candidates = 1 if selection == "none" else candidates
        self._bank, self._hide, self._patches = bank, hide, patches

    def items(self, part: BatchPart) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the index and the epoch of each pair in a part of a batch."""
        size = self._batch_size // part.count * self._candidates
        first = part.step * self._batch_size * self._candidates + part.number * size
        indices, epochs = self._sampling.items(first, size)
        if self._selection != "known":
            return indices, epochs
        rows = best_of_each(self._known(indices, epochs), self._candidates).numpy()
        return indices[rows], epochs[rows]

    def _known(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Tensor:
        """Return the first teacher's cosine of each picture and its caption, NaN without one."""
        cache = self._caches[0]
        counts = cache.caption_counts(indices.tolist())
        bad = np.isin(indices, list(self._unreadable))
        kept = np.flatnonzero((counts > 0) & ~bad)
        chosen, views = indices[kept].tolist(), epochs[kept] % cache.settings.views
        images = cache.image(chosen, views.tolist())
        texts = cache.text(chosen, (epochs[kept] % counts[kept]).tolist())
        scores = torch.full((len(indices),), torch.nan)
        found = (images.astype(np.float32) * texts.astype(np.float32)).sum(axis=-1)
        scores[torch.from_numpy(kept)] = torch.from_numpy(found)
        return scores

    def __call__(self, part: BatchPart) -> Batch:
        timed = _Stages()
        indices, epochs = self.items(part)
        views = epochs % self._caches[0].settings.views
        with timed.stage("reading pictures"):
            crops, bad = self._crops(indices, views)
        readable = np.array([index not in bad for index in indices.tolist()])
        kept = np.flatnonzero(readable)
        inputs = {"pixels": torch.from_numpy(crops)}
        targets = {"readable": torch.from_numpy(readable)}
        if self._hide:
            inputs["hidden"] = self._hidden(part)
        with timed.stage("reading embeddings"):
            for number, cache in enumerate(self._caches):
                rows = cache.image(indices[kept].tolist(), views[kept].tolist())
                targets[f"image {number}"] = spread_rows(rows, kept, len(indices))
            if self._patches:
                squares = self._caches[0].patches(indices[kept].tolist(), views[kept].tolist())
                targets["patches"] = _resampled(squares, kept, len(indices), self._patches)
        if not self._source.has_captions:
            return Batch(inputs=inputs, targets=targets, seconds=timed.seconds, bad=bad)
        captions = [self._source.captions(index) for index in indices.tolist()]
        numbers = [epoch % max(1, len(own)) for epoch, own in zip(epochs, captions, strict=True)]
        captioned = readable & np.array([bool(own) for own in captions])
        with timed.stage("tokenizing"):
            texts = [
                own[number] if own else "" for own, number in zip(captions, numbers, strict=True)
            ]
            ids = self._tokenizer.encode(texts, truncate=True)
            inputs["ids"] = torch.from_numpy(ids)
            targets["caption"] = torch.from_numpy(caption_keys(ids, self._tokenizer.spec.pad_id))
        targets["captioned"] = torch.from_numpy(captioned)
        kept = np.flatnonzero(captioned)
        with timed.stage("reading embeddings"):
            for number, cache in enumerate(self._caches):
                rows = cache.text(indices[kept].tolist(), np.array(numbers)[kept].tolist())
                targets[f"text {number}"] = spread_rows(rows, kept, len(indices))
            if self._bank is not None:
                own = self._caches[0].text_numbers(
                    indices[kept].tolist(), np.array(numbers)[kept].tolist()
                )
                targets |= self._bank_targets(self._bank, part, kept, own)
        return Batch(inputs=inputs, targets=targets, seconds=timed.seconds, bad=bad)

    def _bank_targets(
        self, bank: BankReader, part: BatchPart, kept: NDArray[np.int64], own: NDArray[np.int64]
    ) -> Rows:
        """Return a row that the bank takes in for each pair, and the numbers of their captions."""
        count = self._batch_size // part.count
        first = part.step * self._batch_size + part.number * count + bank.size
        new = bank(first, count)
        numbers = torch.full((count,), -1)
        numbers[torch.from_numpy(kept)] = torch.from_numpy(own)
        return {
            **{f"bank {number}": texts for number, texts in enumerate(new.texts)},
            "bank key": new.keys,
            "bank position": torch.arange(first, first + count),
            "text number": numbers,
        }

    def _hidden(self, part: BatchPart) -> Tensor:
        """Return which squares of each picture are hidden, bool [N, squares, squares]."""
        each = self._candidates if self._selection == "learnable" else 1
        count = self._batch_size // part.count * each
        chance = np.random.default_rng((self._seed, part.step, _OF_MASKS))
        rank = chance.random((self._batch_size * each, _SQUARES**2)).argsort(axis=1).argsort(axis=1)
        hidden = rank < max(1, round(self._hide * _SQUARES**2))
        own = hidden[part.number * count : (part.number + 1) * count]
        return torch.from_numpy(own.reshape(count, _SQUARES, _SQUARES))

    def _crops(
        self, indices: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Return the views uint8 [N, size, size, 3], black where unreadable, and why these are."""
        size = self._spec.size
        crops = np.zeros((len(indices), size, size, 3), np.uint8)
        bad: dict[int, str] = {}
        how = self._caches[0].settings.augmentation
        for place, (index, view) in enumerate(zip(indices.tolist(), views.tolist(), strict=True)):
            if index in self._unreadable:
                bad[index] = ""
                continue
            try:
                image, seed = self._source[index].image, seed_of(self._source, index)
                crops[place] = view_crop(image, self._spec, how, picture_seed=seed, view=view)
            except InputError as error:
                bad[index] = str(error)
        return crops, bad


def _resampled(
    patches: NDArray[np.float16], places: NDArray[np.int64], count: int, wanted: int
) -> Tensor:
    """Resample squares of patches to another number: float16 [count, wanted, width]."""
    side, before = math.isqrt(wanted), math.isqrt(patches.shape[1])
    rows = torch.from_numpy(patches.astype(np.float32))
    if side != before:
        grid = rows.transpose(1, 2).unflatten(2, (before, before))
        grid = nn.functional.interpolate(grid, (side, side), mode="bilinear", antialias=True)
        rows = grid.flatten(2).transpose(1, 2)
    spread = torch.zeros(count, wanted, rows.shape[-1], dtype=torch.float16)
    spread[torch.from_numpy(places)] = rows.half()
    return spread


def caption_keys(ids: NDArray[np.int64], pad_id: int) -> NDArray[np.int64]:
    """Return a number of each row of token ids that its padding does not change: int64 [N]."""
    found = []
    for row in ids:
        used = len(row)
        while used and row[used - 1] == pad_id:
            used -= 1
        digest = hashlib.sha256(row[:used].tobytes()).digest()
        found.append(int.from_bytes(digest[:8], "little", signed=True))
    return np.array(found, np.int64)


class _Stages:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class _BadPictures:
    """Names each picture once that can no longer be read, though it could when it was cached."""

    def __init__(self, count: int, limit: MaxBad) -> None:
        self._count, self._limit = count, limit
        self._reasons: dict[int, str] = {}

    def __call__(self, bad: dict[int, str]) -> None:
        """Note bad pictures by their index.

        Raises:
            InputError: there are more of them than may be.
        """
        for index, reason in bad.items():
            if reason and index not in self._reasons:
                self._reasons[index] = reason
                _log.warning("left out of training: %s", reason)
        if len(self._reasons) > self._limit.allowed(self._count):
            report_bad(list(self._reasons.values()), self._count, self._limit)


def _identity(
    student: DualEncoder,
    caches: Sequence[TeacherCache],
    weights: LossWeights,
    source: Source,
    held_out: int,
    start: str,
) -> str:
    """Return the identity of a run.

    The full model config is not part of it, because it contains the teacher's path and a date. The
    input contract is: a convolutional tower has the same weights for pictures of any size.
    """
    sizes = {name: list(value.shape) for name, value in student.model.state_dict().items()}
    settings = [asdict(own.settings) for own in caches]
    shares = [part.weight for part in parts_of(source)]
    basis = student.basis
    cut = (
        ""
        if basis is None
        else f" to {basis.lengths} by {hashlib.sha256(basis.axes.tobytes()).hexdigest()}"
    )
    model = student.model.config.model_type
    inputs = (asdict(student.image_spec), asdict(student.spec.text))
    settings_text = json.dumps(
        (settings, model, sizes, inputs, asdict(weights), shares, held_out, start),
        sort_keys=True,
    )
    return f"distill {settings_text}{cut}"
