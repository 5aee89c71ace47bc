"""The whole runtime, from verify to eval, where no training package can be imported."""

import subprocess
import sys
from pathlib import Path

BLOCKED = ("torch", "transformers", "onnx", "onnxscript", "optimum", "safetensors", "accelerate")
ROAD = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocker())
from edgeclip.runtime.cli.main import main

bundle, photos, index = sys.argv[1:]
common = ["--bundle", bundle]
for line in (
    ["verify", bundle],
    ["embed", photos, "--out", index, *common],
    ["classify", photos, "--labels", "red,green,blue", "--top", "1", *common],
    ["search", "a red apple", "--index", index, "--top", "1", *common],
    ["eval", photos, *common],
):
    assert main(line) == 0, line
assert not sys.modules.keys() & {set(BLOCKED)}
"""


def test_road_of_a_device(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.npz"
    command = [sys.executable, "-c", ROAD, str(tiny_bundle), str(photos), str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok\n") == 4
    assert "3 embeddings of length 8" in done.stdout
    assert "a red apple\n" in done.stdout
    assert "mean R@1      100.0%" in done.stdout
