"""The faults: how each begins and ends, and what calls under way come to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from _faults_proxy import FaultyProxy, Mode, can_drop_packets, packets_dropped
from _faults_server import ServerProcess

from edgeclip.profiles.record.conditions import CpuSnapshot
from edgeclip.runtime.split.split_runtime import SplitRuntime

DEADLINE_MS = 100.0
GRACE_MS = 20.0
_PER_SECOND = 20.0

Fault = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One call: when it ended (`time.monotonic()`), how long it took, why it is degraded."""

    at: float
    ms: float
    degraded: str | None


@dataclass(frozen=True, slots=True)
class Outage:
    """The calls during a fault; when it began, and when the server was back."""

    seen: list[Seen]
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Bench:
    """All that a case needs: a runtime, the proxy before its server, and a file to show it."""

    runtime: SplitRuntime
    proxy: FaultyProxy
    server: ServerProcess
    other: ServerProcess
    picture: bytes

    def call(self) -> Seen:
        """Embed the picture once."""
        began = time.perf_counter()
        reply = self.runtime.encode_image(self.picture)
        ms = (time.perf_counter() - began) * 1e3
        assert reply.value.shape[0] == 1
        return Seen(time.monotonic(), ms, reply.degraded)

    def calls(self, seconds: float, per_second: float) -> list[Seen]:
        """Calls at an even pace for that long."""
        return self._paced(per_second, lambda passed: passed < seconds)

    def during(self, fault: Fault, seconds: float, per_second: float) -> "Outage":
        """Calls at an even pace while a fault lasts, and until the server is back from it."""
        with ExitStack() as stack:
            began = time.monotonic()
            stack.enter_context(fault())
            seen = self.calls(seconds, per_second)
            mending = threading.Thread(target=stack.close)
            mending.start()
            seen += self._paced(per_second, lambda passed: mending.is_alive())
            return Outage(seen, began, time.monotonic())

    def _paced(self, per_second: float, go_on: Callable[[float], bool]) -> list[Seen]:
        seen: list[Seen] = []
        began = time.monotonic()
        while go_on(time.monotonic() - began):
            seen.append(self.call())
            time.sleep(max(0.0, began + len(seen) / per_second - time.monotonic()))
        return seen

    def faults(self) -> dict[str, Fault]:
        """Every fault by its name; it lasts as long as its context is open."""
        modes: dict[str, Mode] = {
            "accepts, never answers": "swallow",
            "503 to everything": "busy",
            "truncated bodies": "truncate",
            "byte by byte": "trickle",
            "garbage": "garbage",
            "slow": "slow",
        }
        found: dict[str, Fault] = {"killed": self._killed, "SIGSTOP": self._stopped}
        if can_drop_packets():
            found["packets dropped"] = lambda: packets_dropped(self.proxy.port)
        for name, mode in modes.items():
            found[name] = lambda mode=mode: self._mode(mode)  # type: ignore[misc]
        return found | {"wrong space": self._wrong_space}

    @contextmanager
    def _killed(self) -> Iterator[None]:
        self.server.kill()
        self.proxy.break_connections()
        yield
        self.server.start()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        self.server.stop()
        yield
        self.server.go_on()

    @contextmanager
    def _mode(self, mode: Mode) -> Iterator[None]:
        self.proxy.mode = mode
        yield
        self.proxy.mode = "pass"

    @contextmanager
    def _wrong_space(self) -> Iterator[None]:
        self.proxy.lead_to(self.other.port)
        yield
        self.proxy.lead_to(self.server.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What came of one fault.

    Attributes:
        name: of the fault.
        calls: made while it lasted and afterwards.
        in_time: share of them answered by the deadline and 20 ms.
        worst_ms: of the slowest, beyond the deadline; below 0 if it was in time.
        reasons: why replies were degraded, the most frequent first.
        recovery_s: from the end of the fault to the last degraded reply; 0 if there was none.
        denied: share of the CPU time that this process asked for and had to wait for, because
            of other programs; None if it cannot be told.
    """

    name: str
    calls: int
    in_time: float
    worst_ms: float
    reasons: tuple[str, ...]
    recovery_s: float
    denied: float | None


def run_case(bench: Bench, name: str, fault: Fault, *, lasts_s: float, after_s: float) -> Case:
    """Let calls run into a fault and out of it again."""
    bench.calls(0.5, _PER_SECOND)
    before = CpuSnapshot.take()
    outage = bench.during(fault, lasts_s, _PER_SECOND)
    seen = outage.seen + bench.calls(after_s, _PER_SECOND)
    late = np.array([each.ms - DEADLINE_MS for each in seen])
    degraded = [each for each in seen if each.degraded is not None]
    reasons = [each.degraded for each in degraded if each.degraded is not None]
    return Case(
        name=name,
        calls=len(seen),
        in_time=float((late <= GRACE_MS).mean()),
        worst_ms=float(late.max()),
        reasons=tuple(sorted(set(reasons), key=reasons.count, reverse=True)),
        recovery_s=max([0.0, *(each.at - outage.ended for each in degraded)]),
        denied=CpuSnapshot.take().denied_since(before)[0],
    )
