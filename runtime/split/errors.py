"""Errors of calls to a server, on the device's side.

Each has a short `reason`, which a degraded reply reports.
"""

from edgeclip.runtime.errors import EdgeClipError


class ServerError(EdgeClipError):
    """The server did not return a usable response.

    Attributes:
        reason: why, in a few words.
        retryable: whether a retry in a moment may succeed.
        server_works: what the error says about the server's health; None if nothing.
        lasting: whether something has to be fixed, so that a retry soon is of no use.
    """

    reason = "server error"
    retryable = False
    server_works: bool | None = False
    lasting = False


class ServerUnreachableError(ServerError):
    """There is no connection, or it broke before the reply was complete."""

    reason = "unreachable"
    retryable = True


class ServerUntrustedError(ServerError):
    """The server's certificate is not the expected one."""

    reason = "certificate"
    lasting = True


class ServerBusyError(ServerError):
    """The server is overloaded or not ready (429, 502, 503, 504).

    Attributes:
        retry_after: seconds after which to retry, by `Retry-After`; None without that header.
    """

    reason = "server busy"
    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerRefusedError(ServerError):
    """The server answered with another error status.

    Attributes:
        status: the HTTP status.
    """

    reason = "refused"
    _FOR_THE_REQUEST = frozenset({400, 413, 415, 422})
    _FOR_SETTINGS = frozenset({401, 403, 404})  # wrong token, or unknown model

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.server_works = status in self._FOR_THE_REQUEST
        self.lasting = status in self._FOR_SETTINGS


class BadReplyError(ServerError):
    """The reply is complete, but not what was requested."""

    reason = "bad reply"


class WrongSpaceError(ServerError):
    """The server's embeddings are of another embedding space, and cannot be mixed in."""

    reason = "wrong space"
    lasting = True


class DeadlineExceededError(ServerError):
    """The server did not answer in time."""

    reason = "deadline"


class BreakerOpenError(ServerError):
    """The server failed a moment ago and was not called.

    Attributes:
        reason: that of the earlier failure, if it is a lasting one.
    """

    reason = "breaker open"
    server_works = None

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ClientBusyError(ServerError):
    """All connections of this client are busy: one more call would have to queue."""

    reason = "client busy"
    server_works = None


class OutboxError(EdgeClipError):
    """The outbox cannot be opened, read or written."""
