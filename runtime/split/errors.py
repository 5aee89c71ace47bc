"""What can go wrong between a device and a server, as the device sees it.

Each error carries a short `reason`: what a degraded reply says of itself.
"""

from edgeclip.runtime.errors import EdgeClipError


class ServerError(EdgeClipError):
    """The server did not give an answer that can be used.

    Attributes:
        reason: why, in a few words.
        retryable: whether the same call may do better in a moment.
        server_works: what this says of the server's health; None if nothing.
        lasting: whether something has to be mended, so that it is of no use to try again soon.
    """

    reason = "server error"
    retryable = False
    server_works: bool | None = False
    lasting = False


class ServerUnreachableError(ServerError):
    """No connection, or one that broke before the reply was whole."""

    reason = "unreachable"
    retryable = True


class ServerUntrustedError(ServerError):
    """The server's certificate is not the one that was asked for."""

    reason = "certificate"
    lasting = True


class ServerBusyError(ServerError):
    """The server has too much to do, or is not ready (429, 502, 503, 504).

    Attributes:
        retry_after: seconds after which it wants to be asked again; None if it did not say.
    """

    reason = "server busy"
    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerRefusedError(ServerError):
    """The server answered with an HTTP status that is an error.

    Attributes:
        status: the HTTP status.
    """

    reason = "refused"
    _FOR_THE_REQUEST = frozenset({400, 413, 415, 422})
    _FOR_SETTINGS = frozenset({401, 403, 404})  # the token, or a model that is not there

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.server_works = status in self._FOR_THE_REQUEST
        self.lasting = status in self._FOR_SETTINGS


class BadReplyError(ServerError):
    """A reply that came whole, but is not what was asked for."""

    reason = "bad reply"


class WrongSpaceError(ServerError):
    """The server's embeddings are of another embedding space: they are never mixed in."""

    reason = "wrong space"
    lasting = True


class DeadlineExceededError(ServerError):
    """The server did not answer in time."""

    reason = "deadline"


class BreakerOpenError(ServerError):
    """The server failed a moment ago and was not asked.

    Attributes:
        reason: that of the failure that is remembered, where it is a lasting one.
    """

    reason = "breaker open"
    server_works = None

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ClientBusyError(ServerError):
    """Too many calls of this device wait for the server: one more would have to queue."""

    reason = "client busy"
    server_works = None


class OutboxError(EdgeClipError):
    """The outbox cannot be opened, read or written."""
