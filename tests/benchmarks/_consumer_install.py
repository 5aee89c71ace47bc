"""Environments of their own for consumers whose packages do not go with EdgeCLIP's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent / "consumers"
_MARKER = "installed.txt"
_MINUTES = 20
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "pillow"),
    "optimum-intel": ("optimum-intel[openvino]==2.2.0", "pillow"),
}


class InstallError(Exception):
    """A consumer's environment cannot be made here; the message says why."""


def node_command(work: Path) -> list[str]:
    """Install transformers.js under `work`; return the command that runs run.mjs.

    Raises:
        InstallError: no node, or npm cannot install it.
    """
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        raise InstallError(f"{' and '.join(missing)} not found: install Node.js 18 or later")
    folder, wanted = work / "npm", (HERE / "package.json").read_text(encoding="utf-8")
    if _is_stale(folder, wanted):
        _say(f"installing transformers.js into {folder}")
        folder.mkdir(parents=True)
        shutil.copy(HERE / "package.json", folder)
        # onnxruntime-node's script would only fetch CUDA: the CPU's library is in the package.
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        _run(["npm", "install", "--ignore-scripts", *quiet], folder)
        (folder / _MARKER).write_text(wanted, encoding="utf-8")
    shutil.copy(HERE / "run.mjs", folder)  # node looks for packages beside the script
    return ["node", str(folder / "run.mjs")]


def python_command(work: Path, consumer: str) -> list[str]:
    """Make a virtual environment for `consumer`; return the command that runs run_towers.py.

    Raises:
        InstallError: pip cannot install it.
    """
    torch = version("torch").split("+")[0]
    requirements = [*REQUIREMENTS[consumer], f"torch=={torch}"]
    folder, wanted = work / consumer, "\n".join(requirements)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if _is_stale(folder, wanted):
        _say(f"installing {requirements[0]} into {folder}")
        _run([sys.executable, "-m", "venv", str(folder)], work)
        _run([str(python), "-m", "pip", "install", "--quiet", *requirements], work)
        _drop_unfit_torchvision(python, work)
        (folder / _MARKER).write_text(wanted, encoding="utf-8")
    return [str(python), str(HERE / "run_towers.py"), consumer]


def _drop_unfit_torchvision(python: Path, work: Path) -> None:
    """torchvision fits one build of torch only; transformers does without, but not with a bad one.

    PyPI's belongs to PyPI's torch, and pip does not know that beside one from another index.
    """
    probe = "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"
    if subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode:
        _say("removing torchvision, which was built for another torch")
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], work)


def _is_stale(folder: Path, wanted: str) -> bool:
    """Whether to install; what another version or an interrupted installation left is removed."""
    marker = folder / _MARKER
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return True


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=60 * _MINUTES, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{command[0]} took more than {_MINUTES} minutes") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InstallError(f"{Path(command[0]).name} failed: {lines[-1]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
