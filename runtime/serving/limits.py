"""Limits of the server, and the errors that become HTTP responses."""

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import EdgeClipError, EngineError, InputError, SpaceMismatchError
from edgeclip.runtime.wire.messages import WireError

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Limits of the batches and the queue of one model.

    Attributes:
        max_batch: rows of one batch; a request with more rows is run alone.
        max_wait_ms: how long an idle model waits for more rows. Requests that arrive while it
            runs form the next batch anyway.
        queue: requests that may wait for one model.

    Raises:
        ValueError: a value out of bounds.
    """

    max_batch: Annotated[int, Ge(1)] = 32
    max_wait_ms: Annotated[float, Ge(0)] = 0.0
    queue: Annotated[int, Ge(1)] = 128

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the size and duration of requests.

    Attributes:
        max_body: bytes of one request's body.
        max_json: bytes of its JSON part, which is parsed in one go.
        max_memory: bytes of all bodies in flight.
        body_seconds: from the head of a request to the end of its body.
        head_seconds: from its first byte to the end of its head.
        idle_seconds: after which an unused connection is closed.
        grace_seconds: seconds that requests in flight get at shutdown.

    Raises:
        ValueError: a value out of bounds.
    """

    max_body: Annotated[int, Ge(1)] = 16 * _MIB
    max_json: Annotated[int, Ge(1)] = 4 * _MIB
    max_memory: Annotated[int, Ge(1)] = 1024 * _MIB
    body_seconds: Annotated[float, Gt(0)] = 60.0
    head_seconds: Annotated[float, Gt(0)] = 20.0
    idle_seconds: Annotated[int, Ge(1)] = 75
    grace_seconds: Annotated[float, Ge(0)] = 30.0

    def __post_init__(self) -> None:
        check_bounds(self)


CLIENT_GONE = 499  # for the metrics; never sent


class HttpError(EdgeClipError):
    """A request that is answered with an error status.

    Attributes:
        status: the HTTP status.
        headers: further headers of the response.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class QueueFullError(HttpError):
    """The queue is full; the client may retry after `seconds`."""

    def __init__(self, seconds: float) -> None:
        after = retry_after(seconds)
        super().__init__(429, "too many requests wait: try again later", after)


class DrainingError(HttpError):
    """The server is shutting down."""

    def __init__(self, seconds: float = 1.0) -> None:
        after = retry_after(seconds)
        super().__init__(503, "the server is shutting down: try again, or use another one", after)


class DeadlinePassedError(HttpError):
    """The client's deadline passed before the model began."""

    def __init__(self) -> None:
        super().__init__(504, "the deadline passed before the model began")


class ClientGoneError(HttpError):
    """The client closed the connection."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client is gone")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header `Retry-After` in whole seconds, from 1 to 60 (RFC 9110, 10.2.3)."""
    return {"retry-after": str(min(60, max(1, math.ceil(seconds))))}


def http_error_of(error: BaseException) -> HttpError:
    """Convert an exception to an HTTP error; foreign exceptions disclose only their type."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, WireError | InputError):
        return HttpError(400, str(error))
    if isinstance(error, SpaceMismatchError):
        return HttpError(409, str(error))
    if isinstance(error, EngineError):
        return HttpError(500, str(error))
    return HttpError(500, f"the model failed ({type(error).__name__}): see the server's log")
