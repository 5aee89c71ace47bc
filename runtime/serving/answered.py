"""Requests that were sent with a key: one that comes again is answered, and not run again.

A device that lost its connection cannot know whether its request took effect, so it sends it
again under the same key (IETF draft "The Idempotency-Key HTTP Header Field"). The memory is
bounded and ends with the process: what comes again later than that is run again.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgeclip.runtime.serving.refusals import RefusalError

Outputs = dict[str, NDArray[Any]]

_MOST_ENTRIES = 10_000
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    digest: bytes
    outputs: "asyncio.Future[Outputs]"

    @property
    def size(self) -> int:
        if not self.outputs.done() or self.outputs.cancelled() or self.outputs.exception():
            return 0
        return sum(array.nbytes for array in self.outputs.result().values())


class Answered:
    """What became of requests with a key. All methods belong to the event loop's thread.

    Args:
        most_entries: how many are remembered, the latest.
        most_bytes: of their outputs.
    """

    def __init__(self, most_entries: int = _MOST_ENTRIES, most_bytes: int = _MOST_BYTES) -> None:
        self._most_entries, self._most_bytes = most_entries, most_bytes
        self._bytes = 0
        self._known: OrderedDict[tuple[str, str], _Answer] = OrderedDict()

    async def once(
        self,
        model: str,
        key: str,
        inputs: Mapping[str, NDArray[Any]],
        run: Callable[[], Awaitable[Outputs]],
    ) -> Outputs:
        """Run a request, unless one with its key is known; then wait for what that one gives.

        What failed is forgotten, and may be tried again.

        Raises:
            RefusalError: 409, the key was used for other inputs.
            Exception: from `run`.
        """
        name, digest = (model, key), digest_of(inputs)
        known = self._known.get(name)
        if known is None:
            known = _Answer(digest, asyncio.ensure_future(run()))
            self._known[name] = known
            known.outputs.add_done_callback(lambda _: self._settle(name, known))
        elif known.digest != digest:
            raise RefusalError(409, f"the key {key[:60]!r} was used for another request")
        # One client that goes must not take the answer from the others.
        return await asyncio.shield(known.outputs)

    def _settle(self, name: tuple[str, str], answer: _Answer) -> None:
        if answer.outputs.cancelled() or answer.outputs.exception() is not None:
            del self._known[name]
            return
        self._bytes += answer.size
        while len(self._known) > self._most_entries or self._bytes > self._most_bytes:
            oldest = next((key for key, item in self._known.items() if item.outputs.done()), None)
            if oldest is None:
                return
            self._bytes -= self._known.pop(oldest).size


def digest_of(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """BLAKE2b of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(inputs.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        if array.dtype == object:
            for item in array.ravel():
                digest.update(len(item).to_bytes(8, "little") + bytes(item))
        else:
            digest.update(array.tobytes())
    return digest.digest()
