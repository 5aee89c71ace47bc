"""The devices of the service level's benchmark: open-loop traffic through one `SplitRuntime`.

    _service_client.py SETTINGS.json

Prints one JSON line when it is ready to begin, and one of all that happened at the end.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.escalation import Escalation
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.split_runtime import SplitRuntime

_SEED = 0
_THREADS = 64  # requests under way at a time; a stall must not hold back those behind it
_CONNECTIONS = 16
_WARM_UPS = 5
_LEAD = 1.0  # seconds until the first request


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Open-loop traffic with its service level.

    Requests are sent at times that were drawn before, whether or not earlier ones were
    answered; latency counts from there, so that a server which stalls cannot hide it
    (G. Tene, "How NOT to Measure Latency", 2013). Arrivals are a Poisson process.

    Attributes:
        requests_per_second: the mean rate.
        seconds: how long it lasts.
        link: name of the `LinkProfile` between device and server.
        deadline_ms: of each request.
        p99_ms: the service level's 99th percentile of latency.
        answered: the least share of requests that must be answered, 0 to 1.
    """

    name: str
    requests_per_second: float
    seconds: float
    link: str = "lan"
    deadline_ms: float = 1000
    p99_ms: float = 200
    answered: float = 0.999


TRAFFIC = {
    "short": Traffic(name="short", requests_per_second=100, seconds=10),
    "steady": Traffic(name="steady", requests_per_second=290, seconds=600),  # 25 million a day
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the client needs to know; paths as text."""

    student: str
    index: str
    pictures: str
    url: str
    model: str
    traffic: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Log:
    """What happened: one entry for each request, in the order of sending.

    Attributes:
        sent: seconds from the beginning to the scheduled time.
        late: milliseconds from that to the call itself.
        latency: milliseconds from the scheduled time to the answer.
        outcome: "device", "server", "degraded: WHY" or "failed: WHY".
    """

    sent: list[float]
    late: list[float]
    latency: list[float]
    outcome: list[str]


def schedule(traffic: Traffic, seconds: float) -> NDArray[np.float64]:
    """Seconds from the beginning at which requests are sent."""
    count = round(traffic.requests_per_second * seconds)
    rng = np.random.default_rng(_SEED)
    return np.cumsum(rng.exponential(1 / traffic.requests_per_second, count))


def warm_up(
    pool: ThreadPoolExecutor, runtime: SplitRuntime, index: Index, pictures: list[bytes]
) -> None:
    """Let all threads work at once, a few times.

    A pool makes a thread when it first needs one more. With traffic that comes by chance, the
    most that were ever needed keeps rising for a long time, and the memory with it.
    """
    together = threading.Barrier(_THREADS)

    def ask(number: int) -> None:
        together.wait()
        runtime.search(pictures[number % len(pictures)], index, top=1)

    for _ in range(_WARM_UPS):
        list(pool.map(ask, range(_THREADS)))


def drive(
    pool: ThreadPoolExecutor,
    runtime: SplitRuntime,
    index: Index,
    pictures: list[bytes],
    settings: Settings,
) -> Log:
    """Send every request at its time, whatever became of those before it."""
    traffic = TRAFFIC[settings.traffic]
    times = schedule(traffic, settings.seconds)
    count = len(times)
    # Filled in beforehand: a log that grows would look like a program that does.
    late, latency, outcomes = np.full(count, -1.0), np.full(count, -1.0), [""] * count
    began = time.perf_counter() + _LEAD

    def ask(number: int) -> None:
        due = began + times[number]
        late[number] = 1e3 * (time.perf_counter() - due)
        picture = pictures[number % len(pictures)]
        try:
            reply = runtime.search(picture, index, top=1, deadline_ms=traffic.deadline_ms)
            outcome = f"degraded: {reply.degraded}" if reply.degraded else reply.source
        except Exception as error:
            outcome = f"failed: {error}"
        outcomes[number] = sys.intern(outcome)
        latency[number] = 1e3 * (time.perf_counter() - due)

    for number, seconds in enumerate(times):
        wait = began + seconds - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        pool.submit(ask, number)
    pool.shutdown()
    return Log(times.tolist(), late.tolist(), latency.tolist(), outcomes)


def main() -> int:
    """Get ready, say so, drive the traffic, print the log."""
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    device = replace(load_device(THIS_MACHINE), threads=1)
    encoder = Encoder.open(settings.student, device=device)
    index = Index.load(Path(settings.index))
    pictures = [path.read_bytes() for path in sorted(Path(settings.pictures).glob("*.png"))]
    plan = SplitPlan(name="cascade", kind="device", space=encoder.space)
    escalation = Escalation(model=settings.model, cascade=Cascade.certified(encoder))
    rules = ClientRules(connections=_CONNECTIONS)
    with (
        Server(settings.url, rules=rules) as server,
        SplitRuntime(encoder, plan, server, escalation=escalation) as runtime,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        warm_up(pool, runtime, index, pictures)
        print(json.dumps({"ready": True}), flush=True)
        log = drive(pool, runtime, index, pictures, settings)
    print(json.dumps(asdict(log)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
