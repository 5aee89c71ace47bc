"""Run one command as several processes, on one machine or many, through accelerate.

`accelerate launch` and `torchrun` start every process with the same command line, and tell each
its number in the environment. A command that was started plainly is process 0 of 1, and nothing of
accelerate is loaded.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgeclip.compress.compute import best_device

T = TypeVar("T")
_shows_bars = ContextVar("_shows_bars", default=True)
_PATIENCE = timedelta(days=30)


class Processes:
    """The processes of this run. All of them have to call the same methods in the same order."""

    number = 0
    count = 1

    @property
    def device(self) -> torch.device:
        """The torch device of this process."""
        return best_device()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.number == 0

    @property
    def shows_bars(self) -> bool:
        """Whether this process draws progress bars; see `without_bars`."""
        return self.is_first and _shows_bars.get()

    def gather(self, rows: Tensor) -> Tensor:
        """Join the rows of all processes, of equal shapes, in the order of their numbers."""
        return rows

    def gather_objects(self, item: T) -> list[T]:
        """Return the item of each process, in the order of their numbers."""
        return [item]

    def from_first(self, item: T) -> T:
        """Return the item of the first process."""
        return item

    def any(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether any process has set it."""
        return list(flags)

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""

    def wait(self) -> None:
        """Wait until all processes are here."""

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the others run the block after the first process, which may leave files for them."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


class _Launched(Processes):
    """The processes of `accelerate launch` or `torchrun`."""

    def __init__(self) -> None:
        from accelerate import PartialState

        # The others wait for the first process while it downloads or embeds what all of them need.
        self._state: Any = PartialState(cpu=best_device().type == "cpu", timeout=_PATIENCE)
        self.number = int(self._state.process_index)
        self.count = int(self._state.num_processes)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._state.device
        return device

    def gather(self, rows: Tensor) -> Tensor:
        from accelerate.utils import gather

        return torch.as_tensor(gather(rows.detach().contiguous()))

    def gather_objects(self, item: T) -> list[T]:
        from accelerate.utils import gather_object

        return list(gather_object([item]))

    def from_first(self, item: T) -> T:
        from accelerate.utils import broadcast_object_list

        held = [item]
        broadcast_object_list(held)
        return held[0]

    def any(self, *flags: bool) -> list[bool]:
        found = self.gather(torch.tensor([flags], dtype=torch.uint8, device=self.device))
        return list(map(bool, found.amax(dim=0).tolist()))

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        given = [weight.grad for weight in weights if weight.grad is not None]
        together = torch.cat([gradient.flatten().float() for gradient in given])
        torch.distributed.all_reduce(together)
        for gradient, summed in zip(
            given, together.split([gradient.numel() for gradient in given]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def wait(self) -> None:
        self._state.wait_for_everyone()


@contextmanager
def without_bars() -> Iterator[None]:
    """Draw no progress bar of a single training in the block, which has one over all of them."""
    token = _shows_bars.set(False)
    try:
        yield
    finally:
        _shows_bars.reset(token)


def is_helper() -> bool:
    """Tell whether another process of this run writes the files; see `Processes.is_first`."""
    return int(os.environ.get("RANK", "0")) > 0


def silence_helpers() -> None:
    """Let the first process alone log what happens; the others log errors."""
    if is_helper():
        logging.getLogger("edgeclip").setLevel(logging.ERROR)


@functools.cache
def processes() -> Processes:
    """Return the processes of this run."""
    return _Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()
