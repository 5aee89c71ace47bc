"""Send one HTTP request to a model and read the whole reply, with failures as `ServerError`."""

import dataclasses
import email.utils
import http.client
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, Timeout
from urllib3.exceptions import (
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    SSLError,
    TimeoutError,
)

from edgeclip.runtime.errors import InputError, first_line
from edgeclip.runtime.split.connection import (
    Address,
    CancelToken,
    DaemonThreads,
    cancelled_by,
    is_confidential,
    open_pool,
)
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
from edgeclip.runtime.split.retries_and_breaker import Attempt, Deadline
from edgeclip.runtime.wire.messages import (
    DEADLINE_MS,
    JSON_LENGTH_HEADER,
    SPACE_ID,
    InferRequest,
    InferResponse,
    WireError,
    decode_error,
    decode_response,
    encode_request,
    json_length,
)

_CHUNK = 1 << 16
_MAX_MESSAGE = 200  # characters of an error message of the server
_BUSY = frozenset({429, 502, 503, 504})
_CONFLICT = 409  # the request is of another embedding space


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HttpRequest:
    """A request to send."""

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
    token: CancelToken,
    *,
    max_bytes: int,
) -> HttpReply:
    """Send a request and read the whole reply.

    Args:
        pool: provides the connection.
        request: what to send.
        deadline: bounds connecting, sending and each read. Cancelling at the deadline, from
            another thread, bounds the whole.
        token: cancels the exchange.
        max_bytes: bound of the reply's body.

    Raises:
        DeadlineExceededError: the deadline passed, or the exchange was cancelled.
        ServerUnreachableError: no connection, or it broke before the reply was whole.
        ServerUntrustedError: TLS failed: another certificate, or none.
        ServerBusyError, ServerRefusedError, WrongSpaceError: by status.
        BadReplyError: not HTTP, or larger than `max_bytes`.
    """
    left = deadline.left()
    if left <= 0 or token.is_cancelled:
        raise DeadlineExceededError("the server was not asked: no time was left")
    try:
        with cancelled_by(token):
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
                body = _read(response, deadline, max_bytes)
            except BaseException:
                response.close()
                raise
    except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        if token.is_cancelled or deadline.passed:
            raise DeadlineExceededError("the server did not answer in time") from None
        raise _server_error(error, pool) from error
    headers = {name.lower(): value for name, value in response.headers.items()}
    if response.status != 200:
        raise _status_error(response.status, headers, body)
    return HttpReply(headers=headers, body=body)


def _read(response: BaseHTTPResponse, deadline: Deadline, max_bytes: int) -> bytes:
    declared = response.length_remaining
    if declared is not None and declared > max_bytes:
        raise BadReplyError(f"the server's reply has {declared} bytes; {max_bytes} are allowed")
    chunks: list[bytes] = []
    size = 0
    while chunk := response.read1(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise BadReplyError(f"the server's reply has more than the {max_bytes} bytes allowed")
        if deadline.passed:
            raise DeadlineExceededError("the server's reply was not whole in time")
    return b"".join(chunks)


def _server_error(error: Exception, pool: HTTPConnectionPool) -> ServerError:
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


def _status_error(status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    said = " ".join(decode_error(body).split())[:_MAX_MESSAGE] or http.client.responses.get(
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
    """Parse a `Retry-After` header to seconds; None if it is missing or malformed.

    Source: RFC 9110, section 10.2.3: seconds, or an HTTP date.

    Args:
        header: its value.
        now: seconds since 1970, to compare a date with; by default this machine's clock.
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
    return first_line(error)[:_MAX_MESSAGE]


T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class InferCall(Generic[T]):
    """A call of a model: its request, deadline, and reader of the response.

    The attributes are the arguments of `Server.ask`.
    """

    request: InferRequest
    deadline: Deadline
    read: Callable[[InferResponse], T]

    def http_request(self) -> HttpRequest:
        """Make the HTTP request, with the time that is left now.

        Raises:
            WireError: the request holds what the protocol cannot carry.
        """
        left = {DEADLINE_MS: self.deadline.left() * 1e3}
        headers, body = encode_request(
            dataclasses.replace(self.request, parameters={**self.request.parameters, **left})
        )
        path = f"/v2/models/{quote(self.request.model, safe='')}/infer"
        return HttpRequest(method="POST", path=path, headers=headers, body=body)

    def read_reply(self, reply: HttpReply) -> T:
        """Decode the reply and return what `read` makes of it.

        Raises:
            BadReplyError: it violates the protocol, or `read` refuses it.
            WrongSpaceError: it is of another embedding space than the request.
        """
        try:
            length = json_length(reply.headers.get(JSON_LENGTH_HEADER.lower()))
            response = decode_response(reply.body, length)
        except WireError as error:
            raise BadReplyError(f"the server's reply cannot be read: {error}") from error
        _check_space(self.request, response)
        return self.read(response)


def _check_space(request: InferRequest, response: InferResponse) -> None:
    wanted = request.parameters.get(SPACE_ID)
    found = response.parameters.get(SPACE_ID)
    if wanted is not None and found != wanted:
        theirs = "no embedding space" if found is None else f"the embedding space {str(found)[:12]}"
        raise WrongSpaceError(
            f"model {request.model} of the server has {theirs}, not {str(wanted)[:12]}: serve a "
            "bundle of this space"
        )


class Endpoint:
    """A server with a pool of connections and threads.

    Args:
        address: address of the server.
        token: bearer token; None for none.
        connections: maximum number of simultaneous exchanges.

    Raises:
        InputError: an address or token that cannot be used. A token is sent only where nobody
            else can read it.
    """

    def __init__(self, address: Address, *, token: str | None, connections: int) -> None:
        self._address, self._connections = address, connections
        self._pool, self._prefix = open_pool(address, connections)
        self._headers = _authorization(token, address.url)
        self._workers = DaemonThreads(connections, "edgeclip-call")

    @property
    def busy(self) -> int:
        """The number of exchanges in progress, including cancelled ones."""
        return self._workers.busy

    def start(
        self,
        request: Callable[[], HttpRequest],
        read: Callable[[HttpReply], T],
        deadline: Deadline,
        *,
        max_bytes: int,
    ) -> Attempt[T]:
        """Start an exchange on another thread and return at once.

        Args:
            request: makes the request, on that thread.
            read: converts the reply to the result.
            deadline: see `exchange`.
            max_bytes: see `exchange`.

        Raises:
            ClientBusyError: no thread is free, or this is closed.
        """
        token = CancelToken()

        def work() -> T:
            plain = request()
            full = HttpRequest(
                method=plain.method,
                path=self._prefix + plain.path,
                headers={**plain.headers, **self._headers},
                body=plain.body,
            )
            return read(exchange(self._pool, full, deadline, token, max_bytes=max_bytes))

        return Attempt(self._workers.submit(work), token)

    def forget_connections(self) -> None:
        """Use new connections from here on; exchanges in progress continue."""
        # The old pool closes its idle connections once nobody uses it.
        self._pool, _ = open_pool(self._address, self._connections)

    def close(self) -> None:
        """Close idle connections and let the threads end; later exchanges are refused."""
        self._workers.close()
        self._pool.close()


def _authorization(token: str | None, url: str) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("a token must be ASCII without spaces: check where it was read from")
    if not is_confidential(url):
        raise InputError(f"a token is not sent to {url} in the clear: use https://")
    return {"Authorization": f"Bearer {token}"}
