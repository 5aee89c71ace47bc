"""Refusals of the server in the words of gRPC."""

from grpc import StatusCode

from edgeclip.runtime.serving.refusals import CLIENT_GONE, RefusalError

# gRFC A6: when a client that retries by itself may do so.
PUSHBACK = "grpc-retry-pushback-ms"

# All others are for the client to mend up to 499, and for the server from 500.
_CODES = {
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,
    429: StatusCode.RESOURCE_EXHAUSTED,
    CLIENT_GONE: StatusCode.CANCELLED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


def status_of(refusal: RefusalError) -> tuple[StatusCode, tuple[tuple[str, str], ...]]:
    """The status code and the trailers that stand for a refusal's HTTP status and headers.

    Source: https://grpc.io/docs/guides/status-codes
    """
    other = StatusCode.INVALID_ARGUMENT if refusal.status < 500 else StatusCode.INTERNAL
    code = _CODES.get(refusal.status, other)
    after = refusal.headers.get("retry-after")
    return code, () if after is None else ((PUSHBACK, str(int(after) * 1000)),)
