import os
import resource
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeclip.compress.data.loader import killed_workers_explained, load
from edgeclip.runtime.errors import InputError


@dataclass(frozen=True)
class _Item:
    rows: dict[str, Tensor]


def _item(number: int) -> _Item:
    return _Item({"rows": torch.full((300_000,), number)})


def _terminated(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return number


def _killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def _wrong(_number: int) -> int:
    raise RuntimeError("a mistake in the code")


def _without_shared_memory(number: int) -> _Item:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit))
    return _item(number)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_come_in_order(workers: int) -> None:
    found = list(load(_item, range(7), workers=workers))
    assert [int(item.rows["rows"][0]) for item in found] == list(range(7))


def test_full_shared_memory_is_an_error_and_no_endless_wait() -> None:
    with (
        closing(load(_without_shared_memory, range(3), workers=1)) as items,
        pytest.raises(InputError, match="shm-size"),
    ):
        next(items)


def test_a_signal_to_the_whole_group_ends_no_worker() -> None:
    with killed_workers_explained():
        assert list(load(_terminated, range(6), workers=1)) == list(range(6))


def test_a_killed_worker_is_told_from_a_mistake_in_one() -> None:
    with pytest.raises(InputError, match="was killed"), killed_workers_explained():
        list(load(_killed, range(3), workers=1))
    with pytest.raises(RuntimeError, match="a mistake in the code"), killed_workers_explained():
        list(load(_wrong, range(3), workers=1))


class _Unfetched:
    """What a process that is killed has sent in part: it fails where it is unpacked."""

    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        return _fail, (self._error,)


def _fail(error: type[Exception]) -> None:
    raise error("in the middle of a tensor")


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, FileNotFoundError])
def test_a_worker_may_be_killed_while_a_tensor_is_fetched(error: type[Exception]) -> None:
    with pytest.raises(InputError, match="was killed"):
        list(load(lambda _: _Unfetched(error), range(3), workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_connection_that_a_source_lost_is_no_killed_worker(workers: int) -> None:
    def lost(_number: int) -> int:
        raise ConnectionResetError("the peer went away")

    with pytest.raises(ConnectionResetError, match="the peer went away"):
        list(load(lost, range(3), workers=workers))


_ABANDONED = """
import os, signal
import numpy as np
from edgeclip.compress.data.loader import load
def make(number):
    print(os.getpid(), flush=True)
    return np.zeros(1_000_000)
items = load(make, range(9), workers=2)
next(items)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_main_process_that_was_killed() -> None:
    # It ends when nobody can write to the pipe any more.
    ended = subprocess.run([sys.executable, "-c", _ABANDONED], stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.split()
