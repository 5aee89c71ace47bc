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
from edgeclip.runtime.split.http_client import RecentTimes, Server
from edgeclip.runtime.split.remote_models import FarTower, Pictures, typical_file
from edgeclip.runtime.split.resilience import Deadline

# The image tower on a file that is still to be decoded, or on pixels; then what follows it.
Work = Literal["file", "pixels", "labels", "index", "nothing"]

_QUANTILE = 0.95
_MARGIN = 1.25  # of what is measured: the next run may be slower than 95% of the last ones
_MARGIN_S = 0.002  # for waking up


class DeviceTime:
    """Running quantiles of the device's own work, by kind of work and per picture or query."""

    def __init__(self) -> None:
        self._times = {work: RecentTimes() for work in get_args(Work)}

    @contextmanager
    def measured(self, work: Work, count: int) -> Iterator[None]:
        """Measure the block, which does this work on `count` pictures or queries."""
        began = time.perf_counter()
        yield
        self._times[work].add((time.perf_counter() - began) / max(1, count))

    def reserve_s(self, *works: Work, count: int = 1) -> float:
        """Seconds to keep for doing these one after the other; work never seen counts as 0.

        That many pictures are taken to need `count` times as long as one; they need less.
        """
        each = sum(self._times[work].quantile(_QUANTILE) or 0.0 for work in works)
        return _MARGIN * each * max(1, count) + _MARGIN_S


T = TypeVar("T")
Source = Literal["device", "server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """An answer of a `SplitRuntime`.

    Attributes:
        value: the answer, as `Encoder` would give it.
        source: who computed it; "server" if the server had a part in it.
        degraded: why the server had no part in it although it should have, in a few words,
            such as "deadline", "breaker open" or "wrong space"; None if all went as planned.
        ms: how long the call took, in milliseconds.
    """

    value: T
    source: Source
    degraded: str | None
    ms: float


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a part of a call came to; see `Reply`."""

    value: T
    source: Source
    degraded: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A call under way: when it must be over, and when it began (`time.perf_counter()`)."""

    deadline: Deadline
    began: float

    @classmethod
    def within_ms(cls, milliseconds: float) -> "Call":
        """Begin a call.

        Raises:
            InputError: see `Deadline.after_ms`.
        """
        return cls(Deadline.after_ms(milliseconds), time.perf_counter())

    def reply(self, outcome: Outcome[T]) -> Reply[T]:
        """End the call."""
        return Reply(
            value=outcome.value,
            source=outcome.source,
            degraded=outcome.degraded,
            ms=(time.perf_counter() - self.began) * 1e3,
        )


class ServerOrDevice:
    """Decides, piece of work by piece of work, who does it.

    Args:
        server: who is asked.
        time: what the device's own work takes; what is done here is added.
    """

    def __init__(self, server: Server, time: DeviceTime) -> None:
        self._server, self._time = server, time

    def run(
        self,
        far: Callable[[Deadline], T],
        here: Callable[[], T],
        works: tuple[Work, ...],
        count: int,
        deadline: Deadline,
    ) -> Outcome[T]:
        """Ask the server until the device has to begin, and do the work here if it failed.

        Args:
            far: asks the server by a deadline; raises `ServerError`.
            here: does the same work on the device.
            works: what `here` does, then what the device does with the result in any case.
            count: how many pictures or queries.
            deadline: of all of it.
        """
        reason = self._server.refusal()
        if reason is None:
            try:
                return Outcome(far(self._until(works, count, deadline)), "server")
            except ServerError as error:
                reason = error.reason
        with self._time.measured(works[0], count):
            return Outcome(here(), "device", reason)

    def _until(self, works: tuple[Work, ...], count: int, deadline: Deadline) -> Deadline:
        """When the device has to begin; the deadline itself, where it is too late already."""
        reserve = self._time.reserve_s(*works, count=count)
        return deadline.earlier(reserve) if reserve < deadline.left() else deadline


_WARM_RUNS = 5


class SplitTower:
    """Embeds pictures.

    Making one loads the device's tower and measures it.

    Args:
        encoder: the device's own towers.
        far: the server's.
        chooser: decides whose is used.
        time: what the device's takes.

    Raises:
        BundleError, EngineError, MissingExtraError: the device's tower cannot be loaded.
    """

    def __init__(
        self, encoder: Encoder, far: FarTower, chooser: ServerOrDevice, time: DeviceTime
    ) -> None:
        self._encoder, self._far, self._chooser = encoder, far, chooser
        typical = typical_file() if far.sends_files else None
        size = encoder.spec.image.size
        pixels = np.zeros((1, size, size, 3), np.uint8)
        encoder.encode_pixels(pixels)  # the first run plans memory
        for _ in range(_WARM_RUNS):
            with time.measured("pixels", 1):
                encoder.encode_pixels(pixels)
            if typical is not None:
                with time.measured("file", 1):
                    encoder.encode_image(typical)

    def embed(self, pictures: Pictures, deadline: Deadline, *then: Work) -> Outcome[FloatArray]:
        """Embed pictures; float32 [N, dim].

        Args:
            pictures: any number.
            deadline: of all that has to be done.
            then: what the device has to do with the embeddings.

        Raises:
            InputError: a picture that cannot be loaded.
            EngineError: the device's tower failed.
        """
        is_file = self._far.sends_files and not pictures.is_decoded
        return self._chooser.run(
            lambda until: self._far.embed(pictures, until),
            lambda: self._encoder.encode_pixels(pictures.pixels),
            ("file" if is_file else "pixels", *then),
            len(pictures),
            deadline,
        )
