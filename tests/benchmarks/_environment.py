"""Virtual environments of their own for what does not go with EdgeCLIP's packages."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARKER = "installed.txt"  # in a finished folder: what is in it
_SECONDS = 1200


class InstallError(Exception):
    """What is wanted cannot be installed or run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment: its Python, its size, and how long its installation took.

    Attributes:
        python: the interpreter.
        megabytes: of all its files, 10^6 bytes.
        seconds: None where it was there already.
    """

    python: Path
    megabytes: float
    seconds: float | None

    def __str__(self) -> str:
        took = "kept" if self.seconds is None else f"installed in {self.seconds:.0f} s"
        return f"{self.megabytes:.0f} MB, {took}"


def environment(folder: Path, requirements: Sequence[str]) -> Environment:
    """Make a virtual environment, or take the one that is there.

    Args:
        folder: its own; what another version or an interrupted installation left is removed.
        requirements: for pip.

    Raises:
        InstallError: pip cannot install them here.
    """
    wanted = "\n".join(requirements)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not is_stale(folder, wanted):
        return Environment(python=python, megabytes=_megabytes(folder), seconds=None)
    print(f"installing {requirements[0]} into {folder}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    run_tool([sys.executable, "-m", "venv", str(folder)])
    # Isolated (-I): what PYTHONPATH offers is not there for others.
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run_tool([*pip, *requirements])
    seconds = time.perf_counter() - start
    (folder / MARKER).write_text(wanted, encoding="utf-8")
    return Environment(python=python, megabytes=_megabytes(folder), seconds=seconds)


def _megabytes(folder: Path) -> float:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6


def is_stale(folder: Path, wanted: str) -> bool:
    """Whether to install; what another version or an interrupted installation left is removed."""
    marker = folder / MARKER
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return True


def run_tool(command: Sequence[str], folder: Path | None = None) -> None:
    """Run an installer to its end, in a folder if it wants one.

    Raises:
        InstallError: it failed or took too long.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{Path(command[0]).name} took more than {_SECONDS} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InstallError(f"{Path(command[0]).name} failed: {lines[-1]}")
