"""What a device's answers come to while its server fails in every way.

A real server process serves the built-in bundle behind a proxy that can misbehave; the device
sends pictures to it with a deadline, and falls back to the same bundle. Measured are, for each
fault, the share of calls that were answered in time, the slowest one, and when all was well
again; what an open breaker adds to the device's own time; and what the calls of an hour come to:
between its faults they follow each other at once, around them time is real.
"""

import asyncio
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, Rule, finish, hold, options
from _processes import SERVE, ServerProcess

from edgeclip.compress.data.emoji_scenes import EmojiScenes
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.remote_with_fallback import DeviceTimes, RemoteWithFallback
from edgeclip.runtime.split.retries_and_breaker import BreakerRules, Deadline
from edgeclip.runtime.split.split_runtime import SplitRuntime

BARS: dict[str, Rule] = {
    "hour: answered in time": (">=", 1.0, ""),
    "hour: at full quality": (">=", 0.992, ""),  # of its calls
    "open breaker on top of the device's own time, *": ("<=", 1.0, "ms"),
    "*: answered by the deadline + 20 ms": (">=", 1.0, ""),
    "*: slowest answer after the deadline": ("<=", 20.0, "ms"),
    "*: full service again": ("<=", 2.0, "s"),
}
KEPT_MODELS = ("export/emoji_bundle",)

DEADLINE_MS, GRACE_MS = 100.0, 20.0
_RATE, _HOURS_RATE = 20.0, 4.0  # calls a second around each fault, and in the hour
_FAULTY_S = 20.0  # of the hour
_AFTERWARDS_S = 3.0  # of a fault in the hour, until time is left out again
_AWAY_S = 0.5  # before a killed server of the hour is started again
_SLOW_S = 2 * DEADLINE_MS / 1e3
_NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
_AT_ONCE = ClientRules(breaker=BreakerRules(fewest_calls=1, window_calls=1))

Mode = Literal["pass", "swallow", "busy", "truncate", "trickle", "garbage", "slow"]
MODES: dict[str, Mode] = {
    "accepts, never answers": "swallow",
    "503 to everything": "busy",
    "truncated bodies": "truncate",
    "byte by byte": "trickle",
    "garbage": "garbage",
    "slow": "slow",
}
_INSTEAD = {  # of a reply
    "busy": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "garbage": b"\x16\x03\x01 no HTTP at all\r\n\r\n",
}
_CHUNK = 1 << 16

Fault = Callable[[], AbstractContextManager[object]]  # lasts as long as the context is open


class FaultyProxy:
    """Passes bytes on to a port of this machine, or does what its mode says.

    Modes: "swallow" accepts and reads but never answers; "busy" answers each request with 503;
    "truncate" ends each reply some bytes early; "trickle" sends replies byte by byte;
    "garbage" answers what is no HTTP; "slow" hands replies on after `_SLOW_S`.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._mode: Mode = "pass"
        self._changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        server = asyncio.start_server(self._serve, "127.0.0.1", 0)
        listening = asyncio.run_coroutine_threadsafe(server, self._loop).result()
        self.port: int = listening.sockets[0].getsockname()[1]

    @contextmanager
    def doing(self, mode: Mode) -> Iterator[None]:
        """Misbehave inside the block."""
        self._mode = mode
        yield
        self._mode = "pass"
        self._loop.call_soon_threadsafe(self._wake)

    def lead_to(self, target: int) -> None:
        self._target = target
        self.break_connections()

    def break_connections(self) -> None:
        """End every connection, as when a server restarts."""
        for writer in list(self._open):
            self._loop.call_soon_threadsafe(writer.close)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, asked: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            answered, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            client.close()  # the server is gone: so is the connection
            return
        self._open |= {client, server}
        replies = asyncio.create_task(self._hand_back(answered, client))
        with suppress(OSError):
            while data := await asked.read(_CHUNK):
                if self._mode in _INSTEAD:
                    client.write(_INSTEAD[self._mode])
                    client.write_eof()
                elif self._mode != "swallow":
                    server.write(data)
        server.close()
        await replies
        client.close()
        self._open -= {client, server}

    async def _hand_back(
        self, answered: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await answered.read(_CHUNK):
                mode, changed = self._mode, self._changed
                if mode == "truncate":
                    client.write(data[: -len(data) // 4])
                    break
                if mode == "trickle":
                    for byte in data:
                        client.write(bytes([byte]))
                        await wait(changed, 0.005)
                    continue
                if mode == "slow":
                    await wait(changed, _SLOW_S)
                if mode != "swallow":
                    client.write(data)
        if self._mode != "swallow":
            client.close()


async def wait(changed: asyncio.Event, seconds: float) -> None:
    """Wait so long, or until the mode is another."""
    with suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), seconds)


@dataclass(frozen=True, slots=True)
class Seen:
    """One call: when it ended (`time.monotonic()`), how long it took, why it is degraded."""

    at: float
    ms: float
    degraded: str | None


class Bench:
    """A device's runtime, the proxy before its server, and another server of another space."""

    def __init__(self, encoder: Encoder, stack: ExitStack) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = encoder.bundle.path
        self._server = stack.enter_context(ServerProcess((*SERVE, f"B={path}")))
        other = (*SERVE, f"B={bundle_of_another_space(path, folder)}")
        self._other = stack.enter_context(ServerProcess(other))
        self._proxy = FaultyProxy(self._server.port)
        server = stack.enter_context(Server(f"http://127.0.0.1:{self._proxy.port}"))
        self._runtime = SplitRuntime(encoder, plan_for(encoder), server)
        scene = EmojiScenes.render(EmojiScenes("test").scene(0), 320)
        scene.save(file := io.BytesIO(), "JPEG", quality=90)
        self._picture = file.getvalue()
        self.calls(1.0, 50)

    def call(self) -> Seen:
        began = time.perf_counter()
        reply = self._runtime.encode_image(self._picture)
        ms = (time.perf_counter() - began) * 1e3
        assert reply.value.shape[0] == 1
        return Seen(time.monotonic(), ms, reply.degraded)

    def calls(self, seconds: float, rate: float) -> list[Seen]:
        return self._paced(rate, lambda passed: passed < seconds)

    def during(self, fault: Fault, seconds: float, rate: float) -> tuple[list[Seen], float]:
        """Calls at an even pace while a fault lasts, and until the server is back; and when."""
        with ExitStack() as stack:
            stack.enter_context(fault())
            seen = self.calls(seconds, rate)
            mending = threading.Thread(target=stack.close)
            mending.start()
            seen += self._paced(rate, lambda passed: mending.is_alive())
            return seen, time.monotonic()

    def _paced(self, rate: float, go_on: Callable[[float], bool]) -> list[Seen]:
        seen: list[Seen] = []
        began = time.monotonic()
        while go_on(time.monotonic() - began):
            seen.append(self.call())
            time.sleep(max(0.0, began + len(seen) / rate - time.monotonic()))
        return seen

    def faults(self) -> dict[str, Fault]:
        found: dict[str, Fault] = {"killed": self._killed, "SIGSTOP": self._stopped}
        listing = ["iptables", "-L", "INPUT"]  # for root alone
        if shutil.which("iptables") and not subprocess.run(listing, capture_output=True).returncode:
            found["packets dropped"] = self._dropped
        for name, mode in MODES.items():
            found[name] = partial(self._proxy.doing, mode)
        return found | {"wrong space": self._wrong_space}

    @contextmanager
    def _killed(self) -> Iterator[None]:
        self._server.kill()
        self._proxy.break_connections()
        yield
        self._server.start()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        self._server.process.send_signal(signal.SIGSTOP)
        yield
        self._server.process.send_signal(signal.SIGCONT)

    @contextmanager
    def _dropped(self) -> Iterator[None]:
        rule = ["INPUT", "-p", "tcp", "--dport", str(self._proxy.port), "-j", "DROP"]
        subprocess.run(["iptables", "-I", *rule], check=True)
        try:
            yield
        finally:
            subprocess.run(["iptables", "-D", *rule], check=True)

    @contextmanager
    def _wrong_space(self) -> Iterator[None]:
        self._proxy.lead_to(self._other.port)
        yield
        self._proxy.lead_to(self._server.port)

    def run_case(self, name: str, fault: Fault, lasts_s: float) -> Iterator[Bar]:
        """Let calls run into a fault and out of it again."""
        self.calls(0.5, _RATE)
        seen, ended = self.during(fault, lasts_s, _RATE)
        seen += self.calls(2.5, _RATE)
        late = np.array([each.ms for each in seen]) - DEADLINE_MS
        in_time, worst = float((late <= GRACE_MS).mean()), float(late.max())
        last = max([0.0, *(each.at - ended for each in seen if each.degraded is not None)])
        yield hold(BARS, f"{name}: answered by the deadline + {GRACE_MS:g} ms", in_time)
        yield hold(BARS, f"{name}: slowest answer after the deadline", worst)
        yield hold(BARS, f"{name}: full service again", last)

    def run_hour(self, part: int) -> Iterator[Bar]:
        """Spread faults evenly over an hour, or one of so many parts of it with as many faults.

        Together they last 20 s, restarts included. A killed server is away until it has started
        again, however long that takes: it comes first, and the others share what is left.
        """
        faults = list(self.faults().items())[::part]
        left = _FAULTY_S / part
        quiet = (3600 / part - left) / len(faults) - _AFTERWARDS_S
        seen: list[Seen] = []
        for number, (name, fault) in enumerate(faults):
            seen += [self.call() for _ in range(round(quiet * _HOURS_RATE))]
            lasts = _AWAY_S if name == "killed" else left / (len(faults) - number)
            began = time.monotonic()
            found, ended = self.during(fault, lasts, _HOURS_RATE)
            left -= ended - began
            seen += found + self.calls(_AFTERWARDS_S, _HOURS_RATE)
        full = sum(each.degraded is None for each in seen) / len(seen)
        in_time = sum(each.ms <= DEADLINE_MS + GRACE_MS for each in seen) / len(seen)
        yield hold(BARS, "hour: answered in time", in_time)
        yield hold(BARS, "hour: at full quality", full)


def plan_for(encoder: Encoder) -> SplitPlan:
    return SplitPlan(
        name="picture to the server",
        kind="image",
        space=encoder.space,
        model="B-image",
        codec="file",
        deadline_ms=DEADLINE_MS,
    )


def bundle_of_another_space(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose embeddings claim to be of another space."""
    copy = shutil.copytree(bundle, folder / "another_space")
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"space": "f" * 64}), encoding="utf-8")
    return copy


def measure_overhead(encoder: Encoder, runs: int) -> Iterator[Bar]:
    """What an open breaker adds to the device's own work.

    The median of the differences between a call with an open breaker and the encoder's own, one
    after the other on the same pixels; and the 99th percentile of the same call with no work to do.
    """
    size = encoder.spec.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    with Server(_NOBODY, rules=_AT_ONCE) as server:
        runtime = SplitRuntime(encoder, plan_for(encoder), server)
        runtime.encode_pixels(pixels)
        chooser = RemoteWithFallback(server, DeviceTimes())

        def nothing() -> object:
            deadline = Deadline.after_ms(DEADLINE_MS)
            return chooser.run(lambda until: None, lambda: None, ("pixels",), 1, deadline)

        differences, alone = [], []
        for _ in range(runs):
            own = _timed(lambda: encoder.encode_pixels(pixels))
            differences.append(_timed(lambda: runtime.encode_pixels(pixels)) - own)
            alone.append(_timed(nothing))
        assert runtime.encode_pixels(pixels).degraded == "breaker open"
    for name, values, percent in (("paired", differences, 50), ("alone, p99", alone, 99)):
        interval = percentile_interval(np.array(values), percent, least=-math.inf)
        yield hold(BARS, f"open breaker on top of the device's own time, {name}", interval)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def main() -> int:
    args = options(__doc__).parse_args()
    encoder = Encoder.open(EMOJI_BUNDLE)
    overhead = [*measure_overhead(encoder, 300 if args.quick else 3000)]
    bars: list[Bar] = []
    with ExitStack() as stack:
        bench = Bench(encoder, stack)
        for name, fault in bench.faults().items():
            bars += bench.run_case(name, fault, 1.0 if args.quick else 3.0)
        hour = [*bench.run_hour(4 if args.quick else 1)]
    return finish([*bars, *overhead, *hour], args.out)


if __name__ == "__main__":
    sys.exit(main())
