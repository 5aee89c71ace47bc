"""The devices of the service level's benchmark: open-loop traffic through one `SplitRuntime`.

    _service_client.py FOLDER URL MODEL REQUESTS_PER_SECOND SECONDS

FOLDER holds a student, an index and pictures, and gets log.json. Prints `ready` before it begins,
and `done` when the last request was answered.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.escalation import Escalation
from edgeclip.runtime.split.http_client import ClientRules, Server
from edgeclip.runtime.split.remote_with_fallback import Reply
from edgeclip.runtime.split.split_runtime import SplitRuntime

DEADLINE_MS = 1000.0
_SEED = 0
_THREADS = 64  # requests under way at a time; a stall must not hold back those behind it
_CONNECTIONS = 16
_WARM_UPS = 5
_LEAD = 1.0  # seconds until the first request


Ask = Callable[..., Reply[Any]]  # about the picture of a number, perhaps with a deadline


def warm_up(pool: ThreadPoolExecutor, ask: Ask) -> None:
    """Let all threads work at once, a few times.

    With traffic that comes by chance, the most that a pool ever needed keeps rising for a long
    time, and the memory with it.
    """
    together = threading.Barrier(_THREADS)

    def ask_together(number: int) -> None:
        together.wait()
        ask(number)

    for _ in range(_WARM_UPS):
        list(pool.map(ask_together, range(_THREADS)))


def drive(pool: ThreadPoolExecutor, ask: Ask, rate: float, seconds: float) -> dict[str, list[Any]]:
    """Send every request at its time, whatever became of those before it.

    Arrivals are a Poisson process that was drawn before, and latency counts from the scheduled
    time, so that a server which stalls cannot hide it (G. Tene, "How NOT to Measure Latency",
    2013). Of each request there are `sent`, seconds from the beginning to its time; `late` and
    `latency`, milliseconds from that to the call and to the answer; and `outcome`.
    """
    count = round(rate * seconds)
    times = np.cumsum(np.random.default_rng(_SEED).exponential(1 / rate, count))
    # Filled in beforehand: a log that grows would look like a program that does.
    late, latency, outcomes = np.full(count, -1.0), np.full(count, -1.0), [""] * count
    began = time.perf_counter() + _LEAD

    def ask_and_log(number: int) -> None:
        due = began + times[number]
        late[number] = 1e3 * (time.perf_counter() - due)
        try:
            reply = ask(number, deadline_ms=DEADLINE_MS)
            outcome = f"degraded: {reply.degraded}" if reply.degraded else reply.source
        except Exception as error:
            outcome = f"failed: {error}"
        outcomes[number] = sys.intern(outcome)
        latency[number] = 1e3 * (time.perf_counter() - due)

    for number, due in enumerate(times):
        time.sleep(max(0.0, began + due - time.perf_counter()))
        pool.submit(ask_and_log, number)
    pool.shutdown()
    measured = {"sent": times.tolist(), "late": late.tolist(), "latency": latency.tolist()}
    return measured | {"outcome": outcomes}


def main() -> None:
    folder, url, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rate, seconds = map(float, sys.argv[4:])
    device = replace(load_device(THIS_MACHINE), threads=1)
    encoder = Encoder.open(folder / "student", device=device)
    index = Index.load(folder / "captions.npz")
    pictures = [path.read_bytes() for path in sorted((folder / "pictures").glob("*.png"))]
    plan = SplitPlan(name="cascade", kind="device", space=encoder.space)
    cascade = Cascade.certified(encoder, state=folder / "drift.json")
    escalation = Escalation(model=model, cascade=cascade)
    with (
        Server(url, rules=ClientRules(connections=_CONNECTIONS)) as server,
        SplitRuntime(encoder, plan, server, escalation=escalation) as runtime,
        ThreadPoolExecutor(_THREADS) as pool,
    ):

        def ask(number: int, **deadline: float) -> Reply[Any]:
            picture = pictures[number % len(pictures)]
            return runtime.search(picture, index, top=1, **deadline)

        warm_up(pool, ask)
        print("ready", flush=True)
        log = drive(pool, ask, rate, seconds)
        print("done", flush=True)
    (folder / "log.json").write_text(json.dumps(log), encoding="utf-8")


if __name__ == "__main__":
    main()
