"""The bounds that keep a server small and quick, whatever it is sent."""

from dataclasses import dataclass
from typing import Annotated

from edgeclip.profiles.ranges import Range, check_ranges

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How requests to one model are gathered.

    Attributes:
        max_batch: rows that are run at once; a request of more is run alone.
        max_wait_ms: how long an idle model waits for more rows. What arrives while it runs
            is gathered anyway.
        queue: requests that may wait for one model.

    Raises:
        ValueError: a value out of bounds.
    """

    max_batch: Annotated[int, Range(at_least=1)] = 32
    max_wait_ms: Annotated[float, Range(at_least=0)] = 0.0
    queue: Annotated[int, Range(at_least=1)] = 128

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a client may send, and how long it may take.

    Attributes:
        max_body: bytes of one request's body.
        max_json: bytes of its JSON part, which is read in one go.
        max_memory: bytes of all bodies at a time.
        body_seconds: from the head of a request to the end of its body.
        head_seconds: from its first byte to the end of its head.
        idle_seconds: after which an unused connection is closed.
        grace_seconds: for what is under way when the server is told to end.

    Raises:
        ValueError: a value out of bounds.
    """

    max_body: Annotated[int, Range(at_least=1)] = 16 * _MIB
    max_json: Annotated[int, Range(at_least=1)] = 4 * _MIB
    max_memory: Annotated[int, Range(at_least=1)] = 1024 * _MIB
    body_seconds: Annotated[float, Range(above=0)] = 60.0
    head_seconds: Annotated[float, Range(above=0)] = 20.0
    idle_seconds: Annotated[int, Range(at_least=1)] = 75
    grace_seconds: Annotated[float, Range(at_least=0)] = 30.0

    def __post_init__(self) -> None:
        check_ranges(self)
