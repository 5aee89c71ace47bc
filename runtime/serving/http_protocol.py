"""uvicorn's HTTP protocol with bounds on the head of a request, which it does not have itself."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HEAD_BYTES = 64 * 2**10


def bounded_protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """A protocol class that closes connections which take too long over the head of a request.

    A head that is not whole after 64 KiB, and what was read with them, is answered with 400.

    Args:
        head_seconds: from the opening of the connection, or the first byte of a later
            request, to the end of the head.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """Counts bytes and seconds until the head of each request is whole."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # The parser keeps a header until it is whole, and says nothing meanwhile.
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")
                return
            super().data_received(data)
            if self._head_timer is not None:
                self._head_bytes += len(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _begin_head(self) -> None:
            self._end_head()
            self._head_timer = self.loop.call_later(head_seconds, self.transport.close)

        def _end_head(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedProtocol
