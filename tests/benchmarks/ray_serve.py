"""What Ray Serve costs: its start, and the requests it passes on.

The built-in student's text tower is asked for one text at a time, by several connections: as
`edgeclip serve` has it, and on a Ray of this machine. Ray is for more machines than one, or
more processes; on few cores its proxy takes what the replicas need. Ray is installed in
build/ray_serve, with EdgeCLIP as it is.
"""

import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bars import EMOJI_BUNDLE, ROOT, Rule, finish, hold, options
from _processes import ServerProcess, environment, run_to_end
from _server_load import Load, load

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import InferRequest

BARS: dict[str, Rule] = {"ray_max_abs": ("<=", 1e-6, ""), "ray_errors": ("<=", 0, "")}
KEPT_MODELS = ("export/emoji_bundle",)

_PARTS = ("profiles", "runtime", "compress", "export")
_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
_EXTRAS = ("cpu", "split", "serve", "ray")
_CONNECTIONS = 16
_TEXT = "an owl on a blue background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One server under load; `start` in seconds, `max_abs` the difference of its embedding."""

    server: str
    start: float
    max_abs: float
    load: Load


def install() -> str:
    """Make an environment with Ray and with EdgeCLIP as it is; its Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [item for extra in _EXTRAS for item in project["optional-dependencies"][extra]]
    wanted = [*extras, *project["dependencies"]]
    python = environment("ray_serve", [item for item in wanted if not item.startswith("edgeclip[")])
    with tempfile.TemporaryDirectory() as name:  # setuptools writes beside what it builds
        for file in _FILES:
            shutil.copy(ROOT / file, name)
        for part in _PARTS:
            shutil.copytree(ROOT / part, Path(name, part))
        pip = [str(python), "-I", "-m", "pip", "install", "--quiet"]
        run_to_end([*pip, "--no-deps", "--force-reinstall", name])
    return str(python)


def measure(name: str, words: Sequence[str], encoder: Encoder, seconds: int) -> Row:
    """Compare one answer with the encoder's, then load the server."""
    texts = np.array([_TEXT.encode()], object)
    model = f"{encoder.bundle.manifest.name}-text"
    request = InferRequest(model=model, inputs={"texts": texts})
    began = time.perf_counter()
    with ServerProcess(words) as server:
        start = time.perf_counter() - began
        with Server(server.url) as client:
            found = client.infer(request, Deadline.after_ms(60_000)).outputs["text_embeds"]
        load(server.url, request, connections=_CONNECTIONS, seconds=1)  # warm-up
        loaded = load(server.url, request, connections=_CONNECTIONS, seconds=seconds)
    print(
        f"{name:22} {loaded.rate:8,.0f} requests/s  p50 {loaded.p50_ms:6.1f} ms  "
        f"p99 {loaded.p99_ms:6.1f} ms  ready after {start:4.1f} s",
        flush=True,
    )
    largest = float(np.abs(found - encoder.encode_text(_TEXT)).max())
    return Row(server=name, start=start, max_abs=largest, load=loaded)


def main() -> int:
    args = options(__doc__).parse_args()
    python = install()
    ray = (python, "-m", "edgeclip.runtime.cli.ray_app", str(EMOJI_BUNDLE), "--cpus", "0.5")
    servers = {
        "edgeclip serve": (python, "-m", "edgeclip.runtime.cli.main", "serve", str(EMOJI_BUNDLE)),
        "Ray Serve, 1 replica": ray,
        "Ray Serve, 2 replicas": (*ray, "--replicas", "2"),
    }
    encoder, seconds = Encoder.open(EMOJI_BUNDLE), 2 if args.quick else 10
    rows = [measure(name, words, encoder, seconds) for name, words in servers.items()]
    for row in rows[1:]:
        share = row.load.rate / rows[0].load.rate
        print(f"{row.server}: {share:.0%} of the requests of {rows[0].server}")
    bars = [
        hold(BARS, "ray_max_abs", max(row.max_abs for row in rows)),
        hold(BARS, "ray_errors", sum(row.load.errors for row in rows)),
    ]
    return finish(bars, args.out, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
