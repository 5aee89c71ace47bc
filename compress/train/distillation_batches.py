"""Make the batches of a distillation: views of pictures, token ids, and what the teachers say."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.data.augmentation import view_crop
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.selection import Selection, best_of_each
from edgeclip.compress.data.sources import Source, seed_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, spread_rows
from edgeclip.compress.train.text_bank import BankReader
from edgeclip.compress.train.train_loop import Batch, BatchPart, Rows, TrainSettings
from edgeclip.runtime.errors import InputError

_SQUARES = 8  # squares on a side of a picture, each of which the masked loss shows or hides
_OF_MASKS = 0x3A5C  # so that no other use of the seed draws the same numbers


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
        timed = _Timer()
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
            own = self._caches[0].text_numbers(
                indices[kept].tolist(), np.array(numbers)[kept].tolist()
            )
            targets["text number"] = torch.full((len(indices),), -1)
            targets["text number"][torch.from_numpy(kept)] = torch.from_numpy(own)
            if self._bank is not None:
                targets |= self._bank_targets(self._bank, part)
        return Batch(inputs=inputs, targets=targets, seconds=timed.seconds, bad=bad)

    def _bank_targets(self, bank: BankReader, part: BatchPart) -> Rows:
        """Return a row that the bank takes in for each pair."""
        count = self._batch_size // part.count
        first = part.step * self._batch_size + part.number * count + bank.size
        new = bank(first, count)
        return {
            **{f"bank {number}": texts for number, texts in enumerate(new.texts)},
            "bank key": new.keys,
            "bank position": torch.arange(first, first + count),
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


class _Timer:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
