"""Make items in worker processes, in the order in which they are asked for."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from edgeclip.compress.data.augmentation import keep_picture_memory
from edgeclip.runtime.errors import EdgeClipError, InputError

Key = TypeVar("Key")
Item = TypeVar("Item")


def default_workers() -> int:
    """Return how many processes make items: one beside a CPU that trains, several beside a GPU."""
    if not torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // torch.cuda.device_count()))


def load(
    make: Callable[[Key], Item], keys: Iterable[Key], *, workers: int
) -> Generator[Item, None, None]:
    """Yield `make(key)` for each key, in order; the next ones are made meanwhile.

    Close it to end its processes.

    What is made may depend on the key alone, so it is the same for any number of workers. Tensors
    come through shared memory, and pinned where there is a GPU.

    Args:
        make: runs in the worker processes, each of which has a copy of it. An error of EdgeCLIP is
            raised here as it is.
        keys: are read ahead by two for each worker.
        workers: number of processes; 0 makes everything in this one.

    Raises:
        InputError: a worker process was killed while a tensor of its was fetched.
    """
    loader: DataLoader[Any] = DataLoader(
        _Made(make),
        sampler=keys,  # any iterable
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin,
        # What a worker needs is there in a forked process, and need not be pickled.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        prefetch_factor=2 if workers else None,
    )
    for made in _fetched(loader):
        if isinstance(made, _Failed):
            raise made.error
        yield made


def _fetched(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    items = iter(loader)
    while True:
        try:
            made = next(items)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            # Raised by what is made: here, or by torch in a worker, which is alive.
            if not loader.num_workers or str(error).startswith("Caught "):
                raise
            raise _killed() from error
        yield made


def _killed() -> InputError:
    return InputError(
        "a process that reads pictures was killed, perhaps because the memory is full: run it "
        "again to go on, with fewer --workers or a smaller --batch-size"
    )


@contextmanager
def killed_workers_explained() -> Iterator[None]:
    """Turn torch's error about a worker process that was killed, raised anywhere, into one line.

    Raises:
        InputError: a worker process was killed while the block lasted.
    """
    try:
        yield
    except RuntimeError as error:
        # Not "Caught RuntimeError in DataLoader worker process": that one is alive.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _killed() from error


class _Made(Dataset[Any], Generic[Key, Item]):
    """What `make` returns, by its key."""

    def __init__(self, make: Callable[[Key], Item]) -> None:
        self._make = make

    def __getitem__(self, key: Key) -> "Item | _Failed":
        try:
            made = self._make(key)
            if get_worker_info() is not None:
                _share(made)
            return made
        except EdgeClipError as error:
            return _Failed(error)  # raised in a worker, it would come with a traceback in its text


def _share(item: object) -> None:
    """Move the tensors of an item to shared memory, in place.

    The thread that sends items would do it too, but would lose an item for which there is no room,
    and the main process would wait for it for ever.

    Raises:
        InputError: the shared memory is full.
    """
    if isinstance(item, Tensor):
        try:
            item.share_memory_()
        except RuntimeError as error:
            raise InputError(
                f"the shared memory (/dev/shm) has no room for {item.nbytes / 1e6:.0f} MB of a "
                "batch: give it more (`docker run --shm-size 8g`), or choose fewer --workers, "
                "or --workers 0, which needs none"
            ) from error
    elif isinstance(item, Mapping):
        for value in item.values():
            _share(value)
    elif is_dataclass(item):
        for field in fields(item):
            _share(getattr(item, field.name))


class _Failed:
    """An error on its way out of a worker process."""

    def __init__(self, error: EdgeClipError) -> None:
        self.error = error


def _begin(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    signal.signal(signal.SIGTERM, _end_at_the_second)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.getLogger("edgeclip").setLevel(logging.ERROR)  # the main process's to say, too
    keep_picture_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


def _end_at_the_second(_signal: int, _frame: FrameType | None) -> None:
    """Ignore a SIGTERM: the first one may go to a whole group, whose main process ends the others.

    So it does in systemd, Slurm and torchrun.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(main: int) -> None:
    """End this process when the main one is gone, though an item may wait to be sent to it."""
    while os.getppid() == main:
        time.sleep(1)
    os._exit(1)
