"""The few words of ASGI that the server speaks: reading a body, and sending an answer.

Source: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from edgeclip.runtime.serving.refusals import ClientGoneError, QueueFullError, RefusalError

_MOST_DIGITS = 18

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """A whole answer; `content-length` is added when it is sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def send_answer(send: Send, answer: HttpAnswer) -> None:
    """Send an answer."""
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in answer.headers.items()
    ]
    headers.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class BodyBudget:
    """The memory that all bodies under way may take together.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self._left = total

    def take(self, size: int) -> None:
        """Set `size` bytes aside.

        Raises:
            QueueFullError: too few are left.
        """
        if size > self._left:
            raise QueueFullError(1.0)
        self._left -= size

    def give_back(self, size: int) -> None:
        """Free what was taken."""
        self._left += size


async def read_body(
    receive: Receive, headers: Mapping[bytes, bytes], *, most: int, seconds: float
) -> bytes:
    """Read the body of a request.

    Args:
        receive: of the request.
        headers: names in lower case.
        most: bytes.
        seconds: how long it may take to come.

    Raises:
        RefusalError: 413, larger than `most`; 415, compressed; 408, too slow.
        ClientGoneError: the client left first.
    """
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise RefusalError(415, "compressed bodies are not read: send it as it is")
    announced_size(headers, most)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return _first_part(message, most)
    try:
        async with asyncio.timeout(seconds):
            return await _read_on(message, receive, most)
    except TimeoutError:
        raise RefusalError(408, f"the body did not come within {seconds:g} s") from None


async def until_gone(receive: Receive) -> None:
    """Return when the client is gone, or the answer was sent; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def announced_size(headers: Mapping[bytes, bytes], most: int) -> int:
    """Return what `Content-Length` announces, or `most` where it is missing.

    Raises:
        RefusalError: 413, larger than `most`; 400, not a number.
    """
    text = headers.get(b"content-length")
    if text is None:
        return most
    if not text.isdigit():
        raise RefusalError(400, "Content-Length must be a whole number")
    # Digits are counted first: Python refuses to read very long numbers.
    if len(text) > _MOST_DIGITS or int(text) > most:
        raise _too_large(most)
    return int(text)


def _first_part(message: Message, most: int) -> bytes:
    body: bytes = message.get("body", b"")
    if len(body) > most:
        raise _too_large(most)
    return body


async def _read_on(message: Message, receive: Receive, most: int) -> bytes:
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


def _too_large(most: int) -> RefusalError:
    return RefusalError(413, f"the body is larger than {most} bytes: send less at a time")
