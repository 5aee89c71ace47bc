"""A real `edgeclip serve` in a process of its own, which may be killed, stopped and restarted."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from edgeclip.runtime.bundle.files import MANIFEST_NAME

SERVE = (sys.executable, "-m", "edgeclip.runtime.cli.main", "serve")
NAME = "B"  # what the bundle is called there


class ServerProcess:
    """Serves one bundle on one port.

    Attributes:
        port: the same after a restart.
    """

    def __init__(self, bundle: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._bundle = bundle
        self.start()

    def start(self) -> None:
        """Start it, and return when it serves."""
        command = [*SERVE, f"{NAME}={self._bundle}", "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving"):
            raise RuntimeError(f"the server did not start: {line!r}")

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def stop(self) -> None:
        """Let it be, but not run."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)


def bundle_of_another_space(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose embeddings claim to be of another space."""
    copy = shutil.copytree(bundle, folder / "another_space")
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["space"] = "f" * 64
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return copy
