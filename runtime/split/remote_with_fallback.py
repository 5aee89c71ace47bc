"""Send the request to the server and fall back to the device at the deadline."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

import numpy as np

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.errors import ServerError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.remote_models import ImageBatch, RemoteTower, typical_image_file
from edgeclip.runtime.split.retries_and_breaker import Deadline, RecentTimes

T = TypeVar("T")
ComputedBy = Literal["device", "server"]
# Kinds of work of the device: the image tower from an undecoded file or from decoded pixels;
# then scoring labels, searching an index, or nothing.
DeviceWork = Literal["file", "pixels", "labels", "index", "nothing"]

_QUANTILE = 0.95
_MARGIN = 1.25  # factor: the next run may be slower than 95% of the latest ones
_MARGIN_S = 0.002  # for the thread to wake up
_WARM_RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """A result of a `SplitRuntime`.

    Attributes:
        value: the result, as `Encoder` would return it.
        source: who computed it; "server" if the server did part of the work.
        degraded: reason why the device did work that the plan gives to the server, such as
            "deadline", "breaker open" or "wrong space"; None if not degraded.
        ms: how long the call took, in milliseconds.
    """

    value: T
    source: ComputedBy
    degraded: str | None
    ms: float


@dataclass(frozen=True, slots=True)
class StepResult(Generic[T]):
    """The result of one step of a call; the attributes are those of `Reply`."""

    value: T
    source: ComputedBy
    degraded: str | None = None


class DeviceTimes:
    """Recent durations of the device's own work, by kind of work, per picture or query."""

    def __init__(self) -> None:
        self._times = {kind: RecentTimes() for kind in get_args(DeviceWork)}

    @contextmanager
    def measured(self, work: DeviceWork, count: int) -> Iterator[None]:
        """Time the block, which does this work on `count` pictures or queries."""
        began = time.perf_counter()
        yield
        self._times[work].add((time.perf_counter() - began) / max(1, count))

    def reserve_s(self, *work: DeviceWork, count: int = 1) -> float:
        """Return the seconds to reserve for this work, done in sequence; unmeasured kinds count 0.

        `count` pictures are assumed to take `count` times as long as one; they take less.
        """
        one = sum(self._times[kind].quantile(_QUANTILE) or 0.0 for kind in work)
        return _MARGIN * one * max(1, count) + _MARGIN_S


class RemoteWithFallback:
    """Run one step on the server, or on the device if the server fails or is too slow.

    Args:
        server: the server.
        times: durations of the device's own work; what runs here is added.
    """

    def __init__(self, server: Server, times: DeviceTimes) -> None:
        self._server, self._times = server, times

    def run(
        self,
        remote: Callable[[Deadline], T],
        local: Callable[[], T],
        device_work: tuple[DeviceWork, ...],
        count: int,
        deadline: Deadline,
    ) -> StepResult[T]:
        """Call the server; if it fails, or must be given up to keep the deadline, use the device.

        Args:
            remote: calls the server with the deadline that it is given; raises `ServerError`.
            local: computes the same result on the device.
            device_work: kinds of work: that of `local`, then what the device does with the result,
                whoever computed it.
            count: number of pictures or queries.
            deadline: deadline of `local` or `remote` and the work after it together.
        """
        reason = self._server.unavailable_reason()
        if reason is None:
            # Reserve time for the device. If that is more than is left, the server gets the
            # whole deadline.
            reserve = self._times.reserve_s(*device_work, count=count)
            until = deadline.earlier(reserve) if reserve < deadline.left() else deadline
            try:
                return StepResult(remote(until), "server")
            except ServerError as error:
                reason = error.reason
        with self._times.measured(device_work[0], count):
            return StepResult(local(), "device", reason)


def measure_image_tower(encoder: Encoder, times: DeviceTimes, *, with_file: bool) -> None:
    """Load the device's image tower and time it, from pixels and perhaps from a file.

    Raises:
        BundleError, EngineError, MissingExtraError: the tower cannot be loaded or run.
    """
    size = encoder.spec.image.size
    pixels = np.zeros((1, size, size, 3), np.uint8)
    file = typical_image_file() if with_file else None
    encoder.encode_pixels(pixels)  # the first run plans memory
    for _ in range(_WARM_RUNS):
        with times.measured("pixels", 1):
            encoder.encode_pixels(pixels)
        if file is not None:
            with times.measured("file", 1):
                encoder.encode_image(file)


class ImageTowerWithFallback:
    """Embed pictures with a tower on the server; fall back to the device's own tower.

    Args:
        encoder: the device's own towers.
        remote: the server's tower.
        fallback: runs the server's tower, or the device's if that fails.
    """

    def __init__(self, encoder: Encoder, remote: RemoteTower, fallback: RemoteWithFallback) -> None:
        self._encoder, self._remote, self._fallback = encoder, remote, fallback

    def embed(
        self, images: ImageBatch, deadline: Deadline, *next_work: DeviceWork
    ) -> StepResult[FloatArray]:
        """Embed pictures; float32 [N, dim].

        Args:
            images: any number.
            deadline: deadline of the embedding and of `next_work`.
            next_work: what the device then does with the embeddings.

        Raises:
            InputError: a picture that cannot be loaded.
            EngineError: the device's tower failed.
        """
        is_file = self._remote.sends_files and not images.is_decoded
        return self._fallback.run(
            lambda until: self._remote.embed(images, until),
            lambda: self._encoder.encode_pixels(images.pixels),
            ("file" if is_file else "pixels", *next_work),
            len(images),
            deadline,
        )
