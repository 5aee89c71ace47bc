"""The service level: a certified cascade under open-loop traffic, on two cores with its server.

The devices' program runs the built-in student and asks a server for the teacher's opinion where
it is unsure, over the shaped network of `_network.py`. Latency counts from the scheduled time
of each request, and a request is answered when its call gave an answer by its deadline.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _bars import Bar, command, finish, options
from _cascade_case import QUICK, Case, open_case, say
from _network import Network, NetworkUnavailableError, Shape, shaped_network
from _planner_device import ONE_THREAD
from _service_client import TRAFFIC, Log, Settings, Traffic
from _service_watch import Watch
from PIL import Image

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.cascade.cascade_eval_set import embed_captions
from edgeclip.export.cascade.certify import CascadePlan, certify
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.device.device_profile import device_yaml
from edgeclip.runtime.device.link import load_link
from edgeclip.runtime.quality.intervals import bootstrap

_PICTURES = 500
_SEED = 2  # of the pictures that are asked about
_SHORTEST_GROWTH = 60.0  # seconds
_TEACHER = "teacher"  # its name on the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Log and resources of one run."""

    log: Log
    watch: Watch
    seconds: float


def prepare(folder: Path, traffic: Traffic, seconds: float) -> tuple[Case, Settings]:
    """Write bundles, certificate, index and pictures; the address is filled in later."""
    case = open_case(folder, QUICK)
    plan = CascadePlan(
        student=case.student,
        teacher=case.teacher,
        eval_set=case.eval_set,
        score=Margin(),
        bound=0.95,
        delta=0.05,
        index_by="teacher",
        command=command(),
    )
    evaluator = plan.evaluator()
    found = certify(plan, evaluator)
    if found.certificate is None:
        raise RuntimeError("the cascade could not be certified")
    print(found.certificate.promise)
    add_to_bundle(case.student.bundle, found.certificate.path, found.certificate.to_json().encode())
    asked = EmojiSource(
        "test", _PICTURES, size=case.student.spec.image.size, seed=_SEED, distinct=True
    )
    # Each picture finds its own caption among those of the gallery, as when it was certified.
    parts = [embed_captions(case.teacher, asked), evaluator.entries.embeddings]
    embeddings = np.concatenate(parts)
    keys = tuple(map(str, range(len(embeddings))))
    Index(keys=keys, embeddings=embeddings, space=case.student.space).save(folder / "captions.npz")
    (folder / "pictures").mkdir()
    for number in range(_PICTURES):
        picture = Image.fromarray(np.asarray(asked[number].image))
        picture.save(folder / "pictures" / f"{number:04d}.png")
    (folder / "one-thread.yaml").write_text(device_yaml(ONE_THREAD), encoding="utf-8")
    return case, Settings(
        student=str(folder / "student"),
        index=str(folder / "captions.npz"),
        pictures=str(folder / "pictures"),
        url="",
        model=f"{_TEACHER}-image",
        traffic=traffic.name,
        seconds=seconds,
    )


@contextlib.contextmanager
def served(folder: Path, network: Network) -> Iterator[tuple[str, int]]:
    """Serve the teacher on the server's side; gives its address and process."""
    words = [sys.executable, "-m", "edgeclip.runtime.cli.main", "serve"]
    words += [f"{_TEACHER}={folder / 'teacher'}", "--host", network.server_address, "--port", "0"]
    words += ["--insecure", "--device", str(folder / "one-thread.yaml")]
    process = subprocess.Popen(
        network.command("server", words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().split()[-1], process.pid
    finally:
        process.terminate()
        process.wait(30)


def run(folder: Path, network: Network, settings: Settings) -> Result:
    """Drive the traffic, with an eye on both processes."""
    with served(folder, network) as (url, server):
        path = folder / "settings.json"
        path.write_text(json.dumps(asdict(settings) | {"url": url}), encoding="utf-8")
        script = Path(__file__).with_name("_service_client.py")
        words = network.command("device", [sys.executable, str(script), str(path)])
        # glibc keeps a heap for each of the many threads otherwise, and fills them one by one.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as client:
            assert client.stdout is not None
            if not client.stdout.readline():
                raise RuntimeError("the client ended before it was ready")
            say(f"{settings.seconds:g} s of traffic")
            with Watch({"device": client.pid, "server": server}) as watch:
                log = Log(**json.loads(client.stdout.readline()))
    return Result(log=log, watch=watch, seconds=settings.seconds)


def show(result: Result, traffic: Traffic) -> None:
    """Latency by the minute, who answered, what both programs needed."""
    latency, sent = np.array(result.log.latency), np.array(result.log.sent)
    print(f"\n{'minute':<8}{'requests':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'most':>9}")
    minutes = (sent // 60).astype(int)
    for minute in range(minutes.max() + 1):
        part = latency[minutes == minute]
        p50, p95, p99 = np.percentile(part, [50, 95, 99])
        row = f"{minute:<8}{len(part):>9,}{p50:>9.1f}{p95:>9.1f}{p99:>9.1f}{part.max():>9.1f}"
        print(row)
    print(
        f"\n{len(latency) / result.seconds:.1f} requests/s, asked {traffic.requests_per_second:g}"
    )
    print(f"sent late: p99 {np.percentile(result.log.late, 99):.1f} ms")
    for outcome, count in Counter(result.log.outcome).most_common(8):
        print(f"{outcome[:60]:<60}{count / len(latency):>9.2%}")
    for name in ("device", "server"):
        seen = result.watch.seen(name)
        print(
            f"{name}: {seen.cpu_seconds / result.seconds:.2f} processors, "
            f"{seen.rss_mb.max():.0f} MB at most"
        )


def bars(result: Result, traffic: Traffic) -> list[Bar]:
    """What the service level asks for."""
    latency = np.array(result.log.latency)
    failed = np.array([item.startswith("failed") for item in result.log.outcome])
    answered = ~failed & (latency <= traffic.deadline_ms)
    rate = len(latency) / result.log.sent[-1]
    found = [
        Bar(
            name="requests_per_second",
            value=rate,
            direction=">=",
            # The number of arrivals in a given time is Poisson's: within two deviations.
            bound=traffic.requests_per_second * (1 - 2 / math.sqrt(len(latency))),
        ),
        Bar(
            name="p99",
            value=float(np.percentile(latency, 99)),
            direction="<=",
            bound=traffic.p99_ms,
            unit="ms",
        ),
        Bar(
            name="answered",
            value=float(answered.mean()),
            direction=">=",
            bound=traffic.answered,
            interval=bootstrap(answered),
        ),
    ]
    if result.seconds < _SHORTEST_GROWTH:
        print("\nmemory was watched for too short a time to tell whether it grows")
        return found
    for name in ("device", "server"):
        growth = result.watch.seen(name).growth
        found.append(
            Bar(
                name=f"{name}_memory_growth_low_end",
                value=growth.low,
                direction="<=",
                bound=0.0,
                unit="MB in 10 minutes",
                interval=growth,
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, run, print; 1 if the service level was missed."""
    parser = options(__doc__ or "")
    parser.add_argument("--traffic", choices=TRAFFIC, help="default: steady")
    parser.add_argument("--seconds", type=float, help="default: what the profile says")
    args: Any = parser.parse_args(arguments)
    traffic = TRAFFIC[args.traffic or ("short" if args.quick else "steady")]
    link = load_link(traffic.link)
    shape = Shape(up_mbps=link.up_mbps, down_mbps=link.down_mbps, rtt_ms=link.rtt_ms)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, settings = prepare(folder, traffic, args.seconds or traffic.seconds)
        try:
            with shaped_network(shape) as network:
                result = run(folder, network, settings)
        except NetworkUnavailableError as error:
            print(f"not measured: {error}")
            return 2
    show(result, traffic)
    outcomes = dict(Counter(result.log.outcome))
    return finish(bars(result, traffic), args.out, traffic=traffic.name, outcomes=outcomes)


if __name__ == "__main__":
    sys.exit(main())
