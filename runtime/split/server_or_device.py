"""Asks the server as long as there is time, and lets the device do the work otherwise."""

from collections.abc import Callable
from typing import TypeVar

from edgeclip.runtime.split.deadline import Deadline
from edgeclip.runtime.split.device_time import DeviceTime, Work
from edgeclip.runtime.split.errors import ServerError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.reply import Outcome

T = TypeVar("T")


class ServerOrDevice:
    """Decides, piece of work by piece of work, who does it.

    Args:
        server: who is asked.
        time: what the device's own work takes; what is done here is added.
    """

    def __init__(self, server: Server, time: DeviceTime) -> None:
        self._server, self._time = server, time

    def run(
        self,
        far: Callable[[Deadline], T],
        here: Callable[[], T],
        works: tuple[Work, ...],
        count: int,
        deadline: Deadline,
    ) -> Outcome[T]:
        """Ask the server until the device has to begin, and do the work here if it failed.

        Args:
            far: asks the server by a deadline; raises `ServerError`.
            here: does the same work on the device.
            works: what `here` does, then what the device does with the result in any case.
            count: how many pictures or queries.
            deadline: of all of it.
        """
        reason = self._server.refusal()
        if reason is None:
            try:
                return Outcome(far(self._until(works, count, deadline)), "server")
            except ServerError as error:
                reason = error.reason
        with self._time.measured(works[0], count):
            return Outcome(here(), "device", reason)

    def _until(self, works: tuple[Work, ...], count: int, deadline: Deadline) -> Deadline:
        """When the device has to begin; the deadline itself, where it is too late already."""
        reserve = self._time.reserve_s(*works, count=count)
        return deadline.earlier(reserve) if reserve < deadline.left() else deadline
