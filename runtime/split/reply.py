"""Reply: an answer, who gave it, and whether it is the one that was planned."""

import time
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from edgeclip.runtime.split.deadline import Deadline

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
