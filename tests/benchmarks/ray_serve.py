"""What Ray Serve costs: its installation, its start, and the requests it passes on.

The built-in student's text tower is asked for one text at a time, by several connections: as
`edgeclip serve` has it, and on a Ray of this machine. Ray is for more machines than one, or
more processes; on few cores its proxy takes what the replicas need. Ray is installed under
`--work`, with EdgeCLIP as it is.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _bars import EMOJI_BUNDLE, Bar, finish, options
from _environment import InstallError, environment
from _server_load import Load, load, tool

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import JSON_LENGTH_HEADER, InferRequest, encode_request

_ROOT = Path(__file__).parents[2]
_PARTS = ("profiles", "runtime", "compress", "export")
_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
_EXTRAS = ("cpu", "split", "serve", "ray")
_CONNECTIONS = 16
_SECONDS_TO_END = 120
_TEXT = "an owl on a blue background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One server under load; `start` in seconds."""

    server: str
    start: float
    max_abs: float
    load: Load

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.load.answers / self.load.seconds

    def line(self) -> str:
        """As the table has it."""
        return (
            f"{self.server:22} {self.rate:8,.0f} requests/s  p50 {self.load.p50_ms:6.1f} ms  "
            f"p99 {self.load.p99_ms:6.1f} ms  ready after {self.start:4.1f} s"
        )


def install(work: Path) -> Path:
    """An environment with Ray and with EdgeCLIP as it is; its Python.

    Raises:
        InstallError: pip cannot install it here.
    """
    made = environment(work / "ray", _requirements())
    print(f"edgeclip[cpu,ray]: {made}")
    with tempfile.TemporaryDirectory() as name:  # setuptools writes beside what it builds
        copy = Path(name)
        for file in _FILES:
            shutil.copy(_ROOT / file, copy)
        for part in _PARTS:
            shutil.copytree(_ROOT / part, copy / part)
        pip = [str(made.python), "-I", "-m", "pip", "install", "--quiet"]
        done = subprocess.run([*pip, "--no-deps", "--force-reinstall", name], check=False)
        if done.returncode:
            raise InstallError("EdgeCLIP itself cannot be installed")
    return made.python


def _requirements() -> list[str]:
    """What EdgeCLIP with these extras needs, without itself."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [item for extra in _EXTRAS for item in project["optional-dependencies"][extra]]
    found = [*extras, *project["dependencies"]]
    return [item for item in found if not item.startswith("edgeclip[")]


@contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Start a server, and let it end: its address, and the seconds until it was ready."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("serving "))
        url = next(lines).rpartition(" at ")[2].strip()
        yield url, time.perf_counter() - start
    finally:
        process.terminate()
        if process.wait(_SECONDS_TO_END) != 0:
            raise RuntimeError(f"{command[2]} did not end well")


def measure(server: str, command: Sequence[str], encoder: Encoder, seconds: int) -> Row:
    """Compare one answer with the encoder's, then load the server."""
    model = f"{encoder.bundle.manifest.name}-text"
    request = InferRequest(model=model, inputs={"texts": np.array([_TEXT.encode()], object)})
    headers, body = encode_request(request)
    with running(command) as (url, start):
        with Server(url) as client:
            found = client.infer(request, Deadline.after_ms(60_000)).outputs["text_embeds"]
        path = f"{url}/v2/models/{model}/infer"
        length = headers[JSON_LENGTH_HEADER]
        load(path, body, length, connections=_CONNECTIONS, seconds=1)  # warm-up
        loaded = load(path, body, length, connections=_CONNECTIONS, seconds=seconds)
    largest = float(np.abs(found - encoder.encode_text(_TEXT)).max())
    row = Row(server=server, start=start, max_abs=largest, load=loaded)
    print(row.line(), flush=True)
    return row


def main() -> int:
    """Install, start, load."""
    parser = options(__doc__ or "")
    build = _ROOT / "build" / "ray_serve"
    parser.add_argument("--work", type=Path, default=build, help="where Ray is installed")
    args = parser.parse_args()
    python = str(install(args.work.resolve()))
    seconds = 2 if args.quick else 10
    print(f"load by {tool()}, {_CONNECTIONS} connections, one text each")
    shown = [str(EMOJI_BUNDLE), "--port", "0"]
    ray = [python, "-m", "edgeclip.runtime.cli.ray_app", *shown, "--cpus", "0.5"]
    commands = {
        "edgeclip serve": [python, "-m", "edgeclip.runtime.cli.main", "serve", *shown],
        "Ray Serve, 1 replica": ray,
        "Ray Serve, 2 replicas": [*ray, "--replicas", "2"],
    }
    encoder = Encoder.open(EMOJI_BUNDLE)
    rows = [measure(name, command, encoder, seconds) for name, command in commands.items()]
    for row in rows[1:]:
        print(f"{row.server}: {row.rate / rows[0].rate:.0%} of the requests of {rows[0].server}")
    errors = sum(row.load.errors for row in rows)
    largest = max(row.max_abs for row in rows)
    bars = [
        Bar(name="ray_max_abs", value=largest, direction="<=", bound=1e-6),
        Bar(name="ray_errors", value=errors, direction="<=", bound=0),
    ]
    return finish(bars, args.out, load_by=tool(), rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
