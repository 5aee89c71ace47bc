"""Environments of their own for what speaks the Open Inference Protocol beside EdgeCLIP."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from _consumer_install import InstallError

_MARKER = "installed.txt"
_SECONDS = 1200
REQUIREMENTS = {
    "tritonclient": ("tritonclient[http,grpc]==2.73.0",),
    "kserve": ("kserve==0.21.0",),
    "nvidia-pytriton": ("nvidia-pytriton==0.7.0", f"onnxruntime=={version('onnxruntime')}"),
}


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
    marker, wanted = folder / _MARKER, "\n".join(requirements)
    python = folder / "bin" / "python"
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return Environment(python=python, megabytes=_megabytes(folder), seconds=None)
    print(f"installing {requirements[0]} into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    _run([sys.executable, "-m", "venv", str(folder)])
    # Isolated (-I): what PYTHONPATH offers is not there for others.
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *requirements])
    seconds = time.perf_counter() - start
    marker.write_text(wanted, encoding="utf-8")
    return Environment(python=python, megabytes=_megabytes(folder), seconds=seconds)


def _megabytes(folder: Path) -> float:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{Path(command[0]).name} took more than {_SECONDS} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InstallError(f"{Path(command[0]).name} failed: {lines[-1]}")
