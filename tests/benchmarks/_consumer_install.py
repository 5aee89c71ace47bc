"""How consumers whose packages do not go with EdgeCLIP's are installed and started."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from _environment import MARKER, InstallError, environment, is_stale, run_tool

HERE = Path(__file__).parent / "consumers"
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "pillow"),
    "optimum-intel": ("optimum-intel[openvino]==2.2.0", "pillow"),
}


def node_command(work: Path) -> list[str]:
    """Install transformers.js under `work`; return the command that runs run.mjs.

    Raises:
        InstallError: no node, or npm cannot install it.
    """
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        raise InstallError(f"{' and '.join(missing)} not found: install Node.js 18 or later")
    folder, wanted = work / "npm", (HERE / "package.json").read_text(encoding="utf-8")
    if is_stale(folder, wanted):
        _say(f"installing transformers.js into {folder}")
        folder.mkdir(parents=True)
        shutil.copy(HERE / "package.json", folder)
        # onnxruntime-node's script would only fetch CUDA: the CPU's library is in the package.
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        run_tool(["npm", "install", "--ignore-scripts", *quiet], folder)
        (folder / MARKER).write_text(wanted, encoding="utf-8")
    shutil.copy(HERE / "run.mjs", folder)  # node looks for packages beside the script
    return ["node", str(folder / "run.mjs")]


def python_command(work: Path, consumer: str) -> list[str]:
    """Make a virtual environment for `consumer`; return the command that runs run_towers.py.

    Raises:
        InstallError: pip cannot install it.
    """
    torch = version("torch").split("+")[0]
    made = environment(work / consumer, [*REQUIREMENTS[consumer], f"torch=={torch}"])
    _drop_unfit_torchvision(made.python)
    return [str(made.python), str(HERE / "run_towers.py"), consumer]


def _drop_unfit_torchvision(python: Path) -> None:
    """torchvision fits one build of torch only; transformers does without, but not with a bad one.

    PyPI's belongs to PyPI's torch, and pip does not know that beside one from another index.
    """
    probe = "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"
    if subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode:
        _say("removing torchvision, which was built for another torch")
        run_tool([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
