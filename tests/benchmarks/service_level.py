"""The service level: a certified cascade under open-loop traffic, on two cores with its server.

The devices' program runs the built-in student and asks a server for the teacher's opinion where
it is unsure, over the shaped network of `_network.py`. Latency counts from the scheduled time
of each request, and a request is answered when its call gave an answer by its deadline.
"""

import json
import math
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _bars import Bar, Rule, at_least, at_most, finish, options, say
from _cascade_case import open_case
from _network import ADDRESSES, Network, Shape, shaped_network
from _processes import SERVE, ServerProcess, UnavailableError
from _service_client import DEADLINE_MS
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.cascade.cascade_eval_set import embed_captions
from edgeclip.profiles.record.timing_statistics import percentile_interval
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.device.device_profile import device_yaml, load_device
from edgeclip.runtime.device.link import load_link
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share

BARS: dict[str, Rule] = {
    "requests_per_second": (">=", None, ""),  # the rate, less two deviations of Poisson's count
    "p99": ("<=", 200.0, "ms"),
    "answered": (">=", 0.999, ""),
    "device_memory_growth_low_end": ("<=", 0.0, "MB in 10 minutes"),
    "server_memory_growth_low_end": ("<=", 0.0, "MB in 10 minutes"),
}
KEPT_MODELS = ("export/emoji_bundle", "compress/emoji_teacher")

P99_MS, ANSWERED = 200.0, 0.999
RATE = 290.0  # requests a second: 25 million a day
_PICTURES = 500
_SEED = 2  # of the pictures that are asked about
_SHORTEST_GROWTH = 60.0  # seconds
_SETTLED = 0.5  # of the time, until caches, pools and heaps are as large as they get
_BLOCKS = 10
_TEACHER = "teacher"  # its name on the server


Log = dict[str, list[Any]]  # of the client
Memory = dict[str, list[float]]  # RSS of both programs in MB, and the `seconds` it was seen at


def prepare(folder: Path) -> None:
    case = open_case(folder, gallery=5000, calibration=400, test=1500)
    certificate = case.found.certificate
    assert certificate is not None, "tests/benchmarks/cascade.py shows that it is certified"
    print(certificate.promise)
    add_to_bundle(case.student.bundle, certificate.path, certificate.to_json().encode())
    size = case.student.spec.image.size
    asked = EmojiSource("test", _PICTURES, size=size, seed=_SEED, distinct=True)
    # Each picture finds its own caption among those of the gallery, as when it was certified.
    parts = [embed_captions(case.teacher, asked), case.evaluator.entries.embeddings]
    embeddings = np.concatenate(parts)
    keys = tuple(map(str, range(len(embeddings))))
    index = Index(keys, embeddings, case.student.space, case.evaluator.embedder)
    index.save(folder / "captions.npz")
    (folder / "pictures").mkdir()
    for number in range(_PICTURES):
        asked[number].image.save(folder / "pictures" / f"{number:04d}.png")
    device = replace(load_device("this-machine"), threads=1)
    (folder / "one-thread.yaml").write_text(device_yaml(device), encoding="utf-8")


def drive(folder: Path, network: Network, rate: float, seconds: float) -> tuple[Log, Memory]:
    """Serve the teacher, let the client ask, and look at the memory of both."""
    serve = [*SERVE, f"{_TEACHER}={folder / 'teacher'}", "--host", ADDRESSES["server"]]
    serve += ("--insecure", "--device", str(folder / "one-thread.yaml"))
    script = str(Path(__file__).with_name("_service_client.py"))
    # glibc keeps a heap for each of the many threads otherwise, and fills them one by one.
    ask = ("env", "MALLOC_ARENA_MAX=2", sys.executable, script, str(folder))
    with ServerProcess(network.command("server", serve)) as server:
        words = [*ask, server.url, f"{_TEACHER}-image", str(rate), str(seconds)]
        command = network.command("device", words)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            if not client.stdout.readline():
                raise RuntimeError("the client ended before it was ready")
            say(f"{seconds:g} s of traffic ...")
            pids = {"device": client.pid, "server": server.process.pid}
            watched = {name: psutil.Process(pid) for name, pid in pids.items()}
            memory: Memory = {name: [] for name in ("seconds", *pids)}
            while not select.select([client.stdout], [], [], 1.0)[0]:
                memory["seconds"].append(time.perf_counter())
                for name, process in watched.items():
                    memory[name].append(process.memory_info().rss / 1e6)
    return json.loads((folder / "log.json").read_text(encoding="utf-8")), memory


def growth(seconds: NDArray[np.float64], rss_mb: NDArray[np.float64]) -> Interval:
    """MB in ten minutes, once settled, and an interval that holds it with 95% at least.

    Neighbouring samples are alike, so slopes are those between the means of blocks (Theil 1950).
    The interval is the middle 95% of the slopes of all pairs, which is wider than Sen's of 1968.
    """
    keep = seconds >= seconds[0] + _SETTLED * np.ptp(seconds)
    when, size = (
        np.array([part.mean() for part in np.array_split(values[keep], _BLOCKS)])
        for values in (seconds, rss_mb)
    )
    first, second = np.triu_indices(len(when), 1)
    slopes = 600 * (size[second] - size[first]) / (when[second] - when[first])
    low, value, high = (float(item) for item in np.percentile(slopes, [2.5, 50, 97.5]))
    return Interval(value, low, high)


def bars(log: Log, memory: Memory, rate: float) -> list[Bar]:
    latency = np.array(log["latency"])
    failed = np.array([item.startswith("failed") for item in log["outcome"]])
    answered = ~failed & (latency <= DEADLINE_MS)
    seconds_sent = np.floor(log["sent"]).astype(np.int64)  # what goes wrong, does so for a while
    # The number of arrivals in a given time is Poisson's: within two deviations.
    wanted = rate * (1 - 2 / math.sqrt(len(latency)))
    found = [
        at_least("requests_per_second", len(latency) / log["sent"][-1], wanted),
        at_most("p99", percentile_interval(latency, 99), P99_MS, "ms"),
        at_least("answered", estimate_share(answered, seconds_sent).interval, ANSWERED),
    ]
    seconds = np.array(memory["seconds"])
    if np.ptp(seconds) < _SHORTEST_GROWTH:
        print("memory was watched for too short a time to tell whether it grows")
        return found
    for name in ("device", "server"):
        grows, bar = growth(seconds, np.array(memory[name])), f"{name}_memory_growth_low_end"
        found.append(Bar(bar, grows.low, "<=", 0.0, "MB in 10 minutes", grows))
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, help="default: 600, or 10 with --quick")
    args = parser.parse_args()
    rate, seconds = (100.0, args.seconds or 10) if args.quick else (RATE, args.seconds or 600)
    link = load_link("lan")
    shape = Shape(up_mbps=link.up_mbps, down_mbps=link.down_mbps, rtt_ms=link.rtt_ms)
    try:
        with shaped_network(shape) as network, tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            log, memory = drive(Path(folder), network, rate, seconds)
    except UnavailableError as error:
        print(f"not measured: {error}")
        return 2
    for name in ("latency", "late"):
        p50, p95, p99 = np.percentile(log[name], [50, 95, 99])
        print(f"{name}: p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms")
    outcomes = dict(Counter(log["outcome"]))
    print(f"{outcomes}; MB at most: {max(memory['device']):.0f}, {max(memory['server']):.0f}")
    return finish(bars(log, memory, rate), args.out, outcomes=outcomes)


if __name__ == "__main__":
    sys.exit(main())
