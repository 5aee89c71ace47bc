"""Processes that benchmarks start: a server, and what needs packages of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

_ROOT = Path(__file__).parents[2]  # where a server finds tests/echo_function.py
BUILD = _ROOT / "build"
SERVE = (sys.executable, "-m", "edgeclip.runtime.cli.main", "serve")
_SECONDS_TO_END = 120


class UnavailableError(Exception):
    """What is wanted cannot be installed, run or made here; the message says why."""


class ServerProcess:
    """A server that says `serving ... at URL` once it is ready; it ends with the block."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self.port = words, 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before, and return when it serves."""
        command = [*self._words, "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = (line for line in self.process.stdout if line.startswith("serving "))
        self.url = next(said, "").rpartition(" at ")[2].strip()
        if not self.url:
            raise UnavailableError(f"{' '.join(self._words)} did not start")
        self.port = urlsplit(self.url).port or 0

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        if self.process.wait(_SECONDS_TO_END) != 0 and error[0] is None:
            raise RuntimeError("the server did not end well")


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Make a virtual environment in build/NAME, or take the one that is there; its Python."""
    folder = BUILD / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def install() -> None:
        run_to_end([sys.executable, "-m", "venv", str(folder)])
        # Isolated (-I): what PYTHONPATH offers is not there for others.
        pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run_to_end([*pip, *requirements])

    install_once(folder, "\n".join(requirements), install)
    return python


def install_once(folder: Path, wanted: str, install: Callable[[], None]) -> None:
    """Fill a folder, unless it is; what another version or an interruption left is removed."""
    marker = folder / "installed.txt"
    if not marker.exists() or marker.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"installing into {folder}", file=sys.stderr, flush=True)
        install()
        marker.write_text(wanted, encoding="utf-8")


def run_to_end(
    command: Sequence[str],
    folder: Path | None = None,
    *,
    seconds: float = 1200,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end; if it fails or takes too long, raise `UnavailableError`."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{name} took more than {seconds:g} s") from error
    if done.returncode:
        raise UnavailableError(f"{name} failed: {last_line(done.stderr or done.stdout)}")


def last_line(said: str) -> str:
    return ([line.strip() for line in said.splitlines() if line.strip()] or ["no message"])[-1]
