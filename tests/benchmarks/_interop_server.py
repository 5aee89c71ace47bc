"""What `interop.py` installs; and PyTriton, NVIDIA's Triton for Python, started."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from _environment import InstallError, environment

REQUIREMENTS = {
    "tritonclient": ("tritonclient[http,grpc]==2.73.0",),
    "kserve": ("kserve==0.21.0",),
    "nvidia-pytriton": ("nvidia-pytriton==0.7.0", f"onnxruntime=={version('onnxruntime')}"),
}
_SCRIPT = Path(__file__).with_name("_interop_pytriton.py")
_HOST = "127.0.0.1"
_SECONDS = 120


@contextmanager
def pytriton(work: Path, tower: Path) -> Iterator[str]:
    """Serve an image tower as the model B-pixels; the address of HTTP.

    Raises:
        InstallError: it cannot be installed, or does not start here.
    """
    made = environment(work / "nvidia-pytriton", REQUIREMENTS["nvidia-pytriton"])
    print(f"nvidia-pytriton: {made}")
    ports = _free_ports(3)
    command = [str(made.python), "-I", str(_SCRIPT), str(tower), *map(str, ports)]
    log = work / "pytriton.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "LD_LIBRARY_PATH": _library_folder(made.python)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://{_HOST}:{ports[0]}"
    try:
        end = time.monotonic() + _SECONDS
        while not _is_ready(f"{url}/v2/models/B-pixels/ready"):
            if process.poll() is not None or time.monotonic() > end:
                raise InstallError(f"PyTriton did not start: see {log}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(_SECONDS)


def _library_folder(python: Path) -> str:
    """Where the interpreter's library lies, for Triton takes the first that it finds.

    That of another 3.11.x does not go with this one's standard library.
    """
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; Triton does not choose its own."""
    with ExitStack() as sockets:
        found = [sockets.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return [int(bound.getsockname()[1]) for bound in found]


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
