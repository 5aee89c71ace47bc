"""One HTTP request and its whole reply, blocking; every way to fail becomes a `ServerError`."""

import email.utils
import http.client
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, Timeout
from urllib3.exceptions import (
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    SSLError,
    TimeoutError,
)

from edgeclip.runtime.errors import first_line
from edgeclip.runtime.split.connection import CutOff, cut_by
from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.errors import (
    BadReplyError,
    DeadlineExceededError,
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
    ServerUntrustedError,
    WrongSpaceError,
)
from edgeclip.runtime.wire.messages import decode_error

_CHUNK = 1 << 16
_LONGEST_MESSAGE = 200  # characters of what the server says
_BUSY = frozenset({429, 502, 503, 504})
_CONFLICT = 409  # how the server refuses a request of another embedding space


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HttpRequest:
    """What to send."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HttpReply:
    """A reply with status 200; the names of `headers` are in lower case."""

    headers: Mapping[str, str]
    body: bytes


def exchange(
    pool: HTTPConnectionPool,
    request: HttpRequest,
    deadline: Deadline,
    cut_off: CutOff,
    *,
    most_bytes: int,
) -> HttpReply:
    """Send a request and read the whole reply.

    Args:
        pool: gives the connection.
        request: what to send.
        deadline: bounds connecting, sending and each read. `cut_off` at the deadline, from
            another thread, bounds the whole.
        cut_off: ends the exchange.
        most_bytes: of the body that is read.

    Raises:
        DeadlineExceededError: the deadline passed, or the exchange was cut off.
        ServerUnreachableError: no connection, or it broke before the reply was whole.
        ServerUntrustedError: TLS failed: another certificate, or none.
        ServerBusyError, ServerRefusedError, WrongSpaceError: by status.
        BadReplyError: not HTTP, or larger than `most_bytes`.
    """
    left = deadline.left()
    if left <= 0 or cut_off.was_cut:
        raise DeadlineExceededError("the server was not asked: no time was left")
    try:
        with cut_by(cut_off):
            response = pool.urlopen(
                request.method,
                request.path,
                body=request.body,
                headers=request.headers,
                timeout=Timeout(total=left),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                body = _read(response, deadline, most_bytes)
            except BaseException:
                response.close()
                raise
    except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        if cut_off.was_cut or deadline.passed:
            raise DeadlineExceededError("the server did not answer in time") from None
        raise _explained(error, pool) from error
    headers = {name.lower(): value for name, value in response.headers.items()}
    if response.status != 200:
        raise _refusal(response.status, headers, body)
    return HttpReply(headers=headers, body=body)


def _read(response: BaseHTTPResponse, deadline: Deadline, most_bytes: int) -> bytes:
    declared = response.length_remaining
    if declared is not None and declared > most_bytes:
        raise BadReplyError(f"the server's reply has {declared} bytes; {most_bytes} are allowed")
    chunks: list[bytes] = []
    size = 0
    while chunk := response.read1(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > most_bytes:
            raise BadReplyError(f"the server's reply has more than the {most_bytes} bytes allowed")
        if deadline.passed:
            raise DeadlineExceededError("the server's reply was not whole in time")
    return b"".join(chunks)


def _explained(error: Exception, pool: HTTPConnectionPool) -> ServerError:
    where = f"{pool.host}:{pool.port}"
    if isinstance(error, SSLError):
        return ServerUntrustedError(
            f"the server at {where} is not trusted ({_short(error)}): check its fingerprint or CA"
        )
    if isinstance(error, NameResolutionError):
        return ServerUnreachableError(
            f"the name {pool.host} is not known: check the server's address"
        )
    if isinstance(error, NewConnectionError):
        return ServerUnreachableError(f"no server answers at {where}: is it running?")
    if isinstance(error, TimeoutError):
        return DeadlineExceededError("the server did not answer in time")
    cause = error.args[-1] if isinstance(error, ProtocolError) else error
    is_garbled = isinstance(cause, http.client.HTTPException | ValueError)
    if is_garbled and not isinstance(cause, http.client.IncompleteRead | ConnectionError):
        return BadReplyError(f"the reply from {where} is not HTTP ({_short(cause)})")
    return ServerUnreachableError(f"the connection to {where} broke ({_short(cause)})")


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    said = " ".join(decode_error(body).split())[:_LONGEST_MESSAGE] or http.client.responses.get(
        status, "no reason given"
    )
    if status in _BUSY:
        after = retry_after(headers.get("retry-after"))
        return ServerBusyError(f"the server is busy ({status}: {said})", after)
    if status == _CONFLICT:
        return WrongSpaceError(f"the server refused the embedding space ({said})")
    if status < 400:
        return BadReplyError(f"the server answered with status {status}, not with a result")
    return ServerRefusedError(f"the server refused ({status}: {said})", status)


def retry_after(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for; None where there is none to understand.

    Source: RFC 9110, section 10.2.3: seconds, or an HTTP date.

    Args:
        header: its value.
        now: seconds since 1970, for a date; by default those of this machine.
    """
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    wait = moment - (time.time() if now is None else now)
    return max(0.0, wait) if math.isfinite(wait) else None


def _short(error: Exception) -> str:
    return first_line(error)[:_LONGEST_MESSAGE]
