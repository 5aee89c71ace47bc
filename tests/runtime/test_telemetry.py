"""What other packages would report of their use is off before they can be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeclip.runtime import telemetry

# The import of each package that reads a switch fails if the switch is not set by then.
WATCH = """
import importlib.abc, json, os, sys
from pathlib import Path

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"onnxruntime", "huggingface_hub", "transformers", "hf_xet", "ray"}:
            assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1", name
            assert os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1", name
            assert os.environ.get("RAY_USAGE_STATS_ENABLED") == "0", name

sys.meta_path.insert(0, Watch())
"""
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def run_python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code where no switch is set, and no sign of a CI, where ONNX Runtime sends nothing."""
    left_out = {*telemetry.OFF, "CI", "GITHUB_ACTIONS", "DO_NOT_TRACK", "DISABLE_TELEMETRY"}
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**own, **more},
    )


def switches(done: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: found.get(name) for name in telemetry.OFF}


@pytest.mark.parametrize("room", ["runtime", "profiles", "compress", "export"])
def test_every_room_switches_them_off(room: str) -> None:
    done = run_python(f"import edgeclip.{room}\n{SHOW}")
    assert switches(done) == telemetry.OFF
    assert done.stderr == ""


def test_what_the_user_has_set_stays() -> None:
    done = run_python(
        f"import edgeclip.runtime\n{SHOW}", ORT_DISABLE_TELEMETRY="0", RAY_USAGE_STATS_ENABLED="1"
    )
    own = {"ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}
    assert switches(done) == {**telemetry.OFF, **own}


def test_an_empty_variable_is_no_choice() -> None:
    done = run_python(f"import edgeclip.runtime\n{SHOW}", ORT_DISABLE_TELEMETRY="")
    assert switches(done) == telemetry.OFF


# Of a module's own imports the room's come first, so that a few modules stand for all.
@pytest.mark.parametrize("module", ["runtime.hub.pull", "export.quantizing.fp16"])
def test_no_module_imports_such_a_package_before(module: str) -> None:
    if module.startswith("export"):
        pytest.importorskip("torch", reason="only the runtime is installed")
    done = run_python(f"{WATCH}\nimport edgeclip.{module}")
    assert done.returncode == 0, done.stderr


def test_a_process_that_is_started_inherits_them() -> None:
    code = "import edgeclip.runtime, subprocess, sys\n"
    done = run_python(f"{code}subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)")
    assert switches(done) == telemetry.OFF


def test_importing_onnxruntime_writes_no_id_of_the_device(tmp_path: Path) -> None:
    code = "from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime\n"
    done = run_python(f"{code}import_onnxruntime()", HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_is_told_when_onnxruntime_was_there_first(tmp_path: Path) -> None:
    more = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}  # where it may leave that id
    code = "import onnxruntime, edgeclip.runtime"
    assert "set ORT_DISABLE_TELEMETRY=1" in run_python(code, **more).stderr
    assert run_python(code, **more, ORT_DISABLE_TELEMETRY="1").stderr == ""
    assert run_python(code, **more, ORT_DISABLE_TELEMETRY="0").stderr == ""
