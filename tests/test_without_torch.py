"""The rooms of the device work where the packages of training and export are missing."""

import subprocess
import sys
import time
from pathlib import Path

TRAINING_PACKAGES = (
    *("torch", "transformers", "onnx", "onnxscript"),
    *("optimum", "safetensors", "accelerate"),
)
IMPORT_SECONDS = 0.3
ROOT = Path(__file__).parents[1]

BLOCK = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINING_PACKAGES}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""
MODULES = [
    ".".join(("edgeclip", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ("runtime", "profiles")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.stem != "__init__"
]
IMPORT_EVERYTHING = f"""
import importlib

for module in {MODULES}:
    importlib.import_module(module)
    print(module)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_blocker_blocks() -> None:
    for package in TRAINING_PACKAGES:
        done = run_python(f"{BLOCK}\nimport {package}.anything")
        assert done.returncode == 1
        assert f"ImportError: {package} is blocked" in done.stderr


def test_every_module_imports_without_the_training_packages() -> None:
    done = run_python(BLOCK + IMPORT_EVERYTHING)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "edgeclip.runtime.device.device_profile" in imported
    assert "edgeclip.runtime.spec" in imported


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    done = run_python("import sys, edgeclip.runtime\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "edgeclip" in loaded
    assert loaded.isdisjoint({*TRAINING_PACKAGES, "onnxruntime", "PIL"})


def test_importing_the_runtime_is_fast() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = run_python("import edgeclip.runtime")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    # The best of five: a busy machine slows some runs, but cannot speed one up.
    assert min(times) < IMPORT_SECONDS
