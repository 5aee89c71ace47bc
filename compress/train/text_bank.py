"""Keep the teachers' embeddings of many captions beside those of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.teachers.teacher_cache import TeacherCache, spread_rows
from edgeclip.compress.train.loss_terms import Bank


@dataclass(frozen=True, slots=True)
class BankRows:
    """Captions of some positions of a run.

    Attributes:
        texts: each teacher's embeddings, float32 [count, dim]; zeros where there is no caption.
        keys: a number of each caption, equal for equal texts; -1 where there is none, int64.
    """

    texts: list[Tensor]
    keys: Tensor


@dataclass(frozen=True, slots=True)
class BankReader:
    """Reads captions of positions of a run from the caches of its teachers.

    Those held out of training have no position. A worker process may have a copy of it.
    """

    caches: Sequence[TeacherCache]
    sampling: Sampling
    size: int

    def __call__(self, first: int, count: int) -> BankRows:
        """Read the captions of the positions `first` to `first + count - 1`."""
        indices, epochs = self.sampling.items(first, count)
        # One may be unreadable in the cache of one teacher alone.
        each = [own.caption_counts(indices.tolist()) for own in self.caches]
        counts = np.min(each, axis=0)
        kept = np.flatnonzero(counts)
        chosen, numbers = indices[kept].tolist(), (epochs[kept] % counts[kept]).tolist()
        keys = np.full(count, -1, np.int64)
        keys[kept] = self.caches[0].text_numbers(chosen, numbers)
        texts = [spread_rows(own.text(chosen, numbers), kept, count) for own in self.caches]
        return BankRows(texts, torch.from_numpy(keys))


class TextBank:
    """The captions of positions that a run goes through, a batch further with each step.

    The bank of step s, of batches of B, holds those of `size` positions from B (s + 1) on: those
    that come next after the batch, unless its pairs are chosen of candidates, which go through more
    positions. So it depends on the step alone, in every process and after a resume; from step to
    step it takes in as many as a batch has, and is read from the caches as a whole only when a run
    begins or goes on.
    """

    def __init__(self, reader: BankReader, device: torch.device) -> None:
        self._reader, self._device = reader, device
        self._next = -1  # the position behind all that it holds
        self._texts: list[Tensor] = []
        self._keys = torch.empty(0, dtype=torch.int64)

    def after(self, first: int, new: BankRows, captions: Tensor) -> Bank:
        """Take in the rows behind the window of the step before, and return this step's bank.

        Args:
            first: the position of the first of `new`.
            new: as many rows as a batch has, on the device.
            captions: the key of each picture's caption, int64 [N]; the bank says which are equal.
        """
        if self._next != first + len(new.keys):  # else it is asked again of the same step
            self._take_in(first, new)
        keys, texts = self._keys, self._texts
        there = keys >= 0
        if not there.all():
            keys, texts = keys[there], [own[there] for own in texts]
        return Bank(texts=texts, same=captions[:, None] == keys)

    def _take_in(self, first: int, new: BankRows) -> None:
        size, count = self._reader.size, len(new.keys)
        if self._next != first:
            whole = self._reader(first - size, size)
            place = torch.arange(first - size, first).remainder(size)
            self._keys = torch.empty(size, dtype=torch.int64, device=self._device)
            self._keys[place] = whole.keys.to(self._device)
            self._texts = [torch.empty_like(own, device=self._device) for own in whole.texts]
            for held, own in zip(self._texts, whole.texts, strict=True):
                held[place] = own.to(self._device)
        taken = min(size, count)  # of a batch larger than the bank, the last ones
        place = torch.arange(first + count - taken, first + count, device=self._device)
        place = place.remainder(size)
        self._keys[place] = new.keys[count - taken :]
        for held, own in zip(self._texts, new.texts, strict=True):
            held[place] = own[count - taken :]
        self._next = first + count
