"""How many requests the server takes without a model, how quickly it starts, what it holds.

Server and load share two cores, each in a process of its own. The model is a function that
returns the size of its input; everything else (HTTP, wire format, queue, thread of the model,
metrics) is as with any other. The load is made by `wrk` where it is installed.
"""

import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bars import Bar, finish, options
from _server_load import Load, load, tool

from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.wire.messages import JSON_LENGTH_HEADER, InferRequest, encode_request

_SERVE = [sys.executable, "-m", "edgeclip.runtime.cli.main", "serve"]
_SERVE += ["--function", "tests.echo_function:echo", "--port", "0"]
_CORES = 2
_ROOT = Path(__file__).parents[2]  # where the server finds tests/echo_function.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size of body, and how many ask at a time."""

    name: str
    bytes: int
    connections: int
    bound: float


CASES = (
    Case(name="requests_2kb", bytes=2_000, connections=32, bound=4000),
    Case(name="requests_600kb", bytes=600_000, connections=8, bound=600),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that is ready; `seconds` from the start of its process to that."""

    url: str
    pid: int
    seconds: float

    def memory_mb(self) -> float:
        """What it holds in memory (VmRSS), 10^6 bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6


@contextmanager
def running() -> Iterator[Running]:
    """Start a server, and let it end."""
    start = time.perf_counter()
    process = subprocess.Popen(_SERVE, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" at ")[1].strip()
        with urllib.request.urlopen(f"{url}/v2/health/ready") as answer:
            assert answer.status == 200
        yield Running(url=url, pid=process.pid, seconds=time.perf_counter() - start)
    finally:
        process.terminate()
        if process.wait() != 0:
            raise RuntimeError("the server did not end well")


def ask(server: Running, case: Case, seconds: int) -> Load:
    """Load the server with requests of one size."""
    data = np.zeros((1, case.bytes - 256), np.uint8)  # the rest is their JSON part
    headers, body = encode_request(InferRequest(model="echo", inputs={"data": data}))
    url = f"{server.url}/v2/models/echo/infer"
    length = headers[JSON_LENGTH_HEADER]
    found = load(url, body, length, connections=case.connections, seconds=seconds)
    if found.errors or not found.answers:
        raise RuntimeError(f"{found.errors} of the requests were not answered")
    return found


def measure(server: Running, case: Case, *, runs: int, seconds: int) -> Bar:
    """Requests a second: the median of some runs, and the lowest and highest."""
    ask(server, case, 1)  # warm-up
    found = [ask(server, case, seconds) for _ in range(runs)]
    rates = [each.answers / each.seconds for each in found]
    middle = statistics.median(rates)
    p50, p99 = (
        statistics.median(getattr(each, name) for each in found) for name in ("p50_ms", "p99_ms")
    )
    print(
        f"{case.bytes / 1000:6g} KB  {case.connections:3} connections  {middle:8,.0f} requests/s "
        f"({min(rates):,.0f} to {max(rates):,.0f})  {middle * case.bytes / 1e6:6,.0f} MB/s  "
        f"p50 {p50:.2f} ms  p99 {p99:.2f} ms"
    )
    return Bar(
        name=case.name,
        value=middle,
        direction=">=",
        bound=case.bound,
        unit="requests/s",
        interval=Interval(middle, min(rates), max(rates)),
    )


def main() -> int:
    """Start servers, load one, and quote medians."""
    args = options(__doc__ or "").parse_args()
    runs, seconds, starts = (2, 1, 3) if args.quick else (5, 5, 9)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])  # and all that it starts
    print(f"load by {tool()}, on {len(os.sched_getaffinity(0))} cores with the server")
    with running() as server:
        idle = server.memory_mb()
        bars = [measure(server, case, runs=runs, seconds=seconds) for case in CASES]
        loaded = server.memory_mb()
    times = []
    for _ in range(starts):
        with running() as server:
            times.append(server.seconds)
    middle = statistics.median(times)
    print(f"start: {middle:.2f} s, {min(times):.2f} to {max(times):.2f}, {starts} times")
    print(f"memory: {idle:.1f} MB after the start, {loaded:.1f} MB after the load")
    spread = Interval(middle, min(times), max(times))
    bars += [
        Bar(name="start", value=middle, direction="<=", bound=1.5, unit="s", interval=spread),
        Bar(name="memory", value=max(idle, loaded), direction="<=", bound=80, unit="MB"),
    ]
    return finish(bars, args.out, load_by=tool())


if __name__ == "__main__":
    sys.exit(main())
