"""Exchanges with one server on threads of their own, each of which can be given up at any time."""

from collections.abc import Callable
from typing import TypeVar

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.connection import Address, CutOff, is_private, open_pool
from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.hedge import Attempt
from edgeclip.runtime.split.http_exchange import HttpReply, HttpRequest, exchange
from edgeclip.runtime.split.workers import Workers

T = TypeVar("T")


class Endpoint:
    """A server's address, with connections that are kept.

    Args:
        address: where it is.
        token: sent as a bearer token; None for none.
        connections: how many exchanges there may be at a time.

    Raises:
        InputError: an address or token that cannot be used. A token is sent only where nobody
            else can read it.
    """

    def __init__(self, address: Address, *, token: str | None, connections: int) -> None:
        self._address, self._connections = address, connections
        self._pool, self._prefix = open_pool(address, connections)
        self._headers = _authorization(token, address.url)
        self._workers = Workers(connections, "edgeclip-call")

    @property
    def busy(self) -> int:
        """How many exchanges are under way, those that were given up included."""
        return self._workers.busy

    def start(
        self,
        request: Callable[[], HttpRequest],
        read: Callable[[HttpReply], T],
        deadline: Deadline,
        *,
        most_bytes: int,
    ) -> Attempt[T]:
        """Begin an exchange and return at once.

        Args:
            request: makes what is sent, at the last moment.
            read: makes the result of the reply.
            deadline: see `exchange`.
            most_bytes: see `exchange`.

        Raises:
            ClientBusyError: no thread is free, or this was closed.
        """
        cut_off = CutOff()

        def work() -> T:
            plain = request()
            full = HttpRequest(
                method=plain.method,
                path=self._prefix + plain.path,
                headers={**plain.headers, **self._headers},
                body=plain.body,
            )
            return read(exchange(self._pool, full, deadline, cut_off, most_bytes=most_bytes))

        return Attempt(self._workers.submit(work), cut_off)

    def forget_connections(self) -> None:
        """Connect anew from here on; exchanges under way go on."""
        # The old pool closes its idle connections once nobody uses it.
        self._pool, _ = open_pool(self._address, self._connections)

    def close(self) -> None:
        """Close idle connections and let the threads end; nothing can be started after that."""
        self._workers.close()
        self._pool.close()


def _authorization(token: str | None, url: str) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("a token is ASCII without spaces: check where it was read from")
    if not is_private(url):
        raise InputError(f"a token is not sent to {url} in the clear: use https://")
    return {"Authorization": f"Bearer {token}"}
