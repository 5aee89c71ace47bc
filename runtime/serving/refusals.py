"""Why the server did not answer a request, and the HTTP status that says so."""

import math

from edgeclip.profiles.errors import EdgeClipError
from edgeclip.runtime.errors import EngineError, InputError, SpaceMismatchError
from edgeclip.runtime.wire.messages import WireError

CLIENT_GONE = 499  # never sent; for the metrics


class RefusalError(EdgeClipError):
    """A request that is answered with an HTTP status instead of a result.

    Attributes:
        status: the HTTP status.
        headers: what else the answer says.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class QueueFullError(RefusalError):
    """More requests wait than the server takes; `seconds` is when to come again."""

    def __init__(self, seconds: float) -> None:
        after = retry_after(seconds)
        super().__init__(429, "too many requests wait: try again later", after)


class DrainingError(RefusalError):
    """The server is about to end."""

    def __init__(self, seconds: float = 1.0) -> None:
        after = retry_after(seconds)
        super().__init__(503, "the server is ending: try again, or use another", after)


class DeadlinePassedError(RefusalError):
    """The client's deadline passed before the model began."""

    def __init__(self) -> None:
        super().__init__(504, "the deadline passed before the model began")


class ClientGoneError(RefusalError):
    """The client closed the connection."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client is gone")


def retry_after(seconds: float) -> dict[str, str]:
    """The header `Retry-After` in whole seconds, from 1 to 60 (RFC 9110, 10.2.3)."""
    return {"retry-after": str(min(60, max(1, math.ceil(seconds))))}


def refusal_of(error: BaseException) -> RefusalError:
    """The answer to a request that failed; what is not EdgeCLIP's own error tells nothing."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, WireError | InputError):
        return RefusalError(400, str(error))
    if isinstance(error, SpaceMismatchError):
        return RefusalError(409, str(error))
    if isinstance(error, EngineError):
        return RefusalError(500, str(error))
    return RefusalError(500, f"the model failed ({type(error).__name__}): see the server's log")
