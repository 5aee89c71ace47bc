"""How many requests the server takes without a model, how quickly it starts, what it holds.

Server and load share two cores, each in a process of its own. The model is a function that
returns the size of its input; everything else (HTTP, wire format, queue, thread of the model,
metrics) is as with any other.
"""

import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence

import numpy as np
import psutil
from _bars import Bar, Rule, finish, hold, options
from _processes import SERVE, ServerProcess
from _server_load import load

from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.wire.messages import InferRequest

BARS: dict[str, Rule] = {
    "requests_2kb": (">=", 4000, "requests/s"),
    "requests_600kb": (">=", 600, "requests/s"),
    "start": ("<=", 1.5, "s"),
    "memory": ("<=", 80, "MB"),
}

_WORDS = (*SERVE, "--function", "tests.echo_function:echo")
_CORES = 2
_CASES = (  # name, bytes of a body, connections
    ("requests_2kb", 2_000, 32),
    ("requests_600kb", 600_000, 8),
)


def spread(values: Sequence[float]) -> Interval:
    return Interval(statistics.median(values), min(values), max(values))


def memory_mb(server: ServerProcess) -> float:
    return float(psutil.Process(server.process.pid).memory_info().rss / 1e6)


def throughput(url: str, name: str, size: int, connections: int, *, quick: bool) -> Bar:
    """Load the server with requests of one size, some times."""
    data = np.zeros((1, size - 256), np.uint8)  # the rest is their JSON part
    request = InferRequest(model="echo", inputs={"data": data})
    load(url, request, connections=connections, seconds=1)  # warm-up
    runs, seconds = (2, 1) if quick else (5, 5)
    found = [load(url, request, connections=connections, seconds=seconds) for _ in range(runs)]
    if errors := sum(item.errors for item in found):
        raise RuntimeError(f"{errors} of the requests were not answered")
    rate = spread([item.rate for item in found])
    print(
        f"{size / 1000:6g} KB  {connections:3} connections  {rate.value:8,.0f} requests/s "
        f"({rate.low:,.0f} to {rate.high:,.0f})  {rate.value * size / 1e6:6,.0f} MB/s  "
        f"p50 {statistics.median(item.p50_ms for item in found):.2f} ms  "
        f"p99 {statistics.median(item.p99_ms for item in found):.2f} ms"
    )
    return hold(BARS, name, rate)


def start_seconds() -> float:
    """From the start of its process to an answer that it is ready."""
    start = time.perf_counter()
    with ServerProcess(_WORDS) as server:
        urllib.request.urlopen(f"{server.url}/v2/health/ready").close()
        return time.perf_counter() - start


def main() -> int:
    args = options(__doc__).parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])  # and all that it starts
    with ServerProcess(_WORDS) as server:
        idle = memory_mb(server)
        bars = [throughput(server.url, *case, quick=args.quick) for case in _CASES]
        loaded = memory_mb(server)
    starts = spread([start_seconds() for _ in range(3 if args.quick else 9)])
    print(f"start: {starts.value:.2f} s, {starts.low:.2f} to {starts.high:.2f}")
    print(f"memory: {idle:.1f} MB after the start, {loaded:.1f} MB after the load")
    bars += [
        hold(BARS, "start", starts),
        hold(BARS, "memory", max(idle, loaded)),
    ]
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
