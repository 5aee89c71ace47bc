"""Measure the cold start of a fresh process: import, load, first run, peak memory.

`measure_cold_start` starts such processes. The process itself is this module:
`python -m edgeclip.profiles.measure.cold_start MODEL --input NAME=DTYPE:SHAPE --device DEVICE`
prints one line of JSON. It imports nothing heavy before its clock starts, hence the imports
inside functions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeclip.runtime.errors import EdgeClipError, EngineError, InputError, without_colour

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.profiles.record.measurement import ColdStart, StartIntervals
    from edgeclip.runtime.device.device_profile import DeviceProfile
    from edgeclip.runtime.stats.interval import Interval

_TIMEOUT_S = 600


def measure_cold_start(
    model: Path,
    inputs: "Mapping[str, NDArray[Any]]",
    *,
    device: "DeviceProfile",
    processes: int = 3,
) -> "ColdStart":
    """Start fresh processes one after the other, and average their steps.

    The import step covers `edgeclip.runtime.encoder`, the engine's package and the device
    profile; Python's own start is not counted. The operating system may have the files in its
    cache already.

    Args:
        model: the ONNX file; its external data files count towards its size.
        inputs: example inputs by name; only their shapes and types are used.
        device: says which engine to use.
        processes: number of processes, at least 1.

    Raises:
        EngineError: a process failed; the message ends with its own last line.
        InputError: `processes` is below 1, or the file is missing.
    """
    from edgeclip.profiles.measure.onnx_model import data_files
    from edgeclip.profiles.record.measurement import ColdStart
    from edgeclip.runtime.device.device_profile import device_yaml

    if processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    if not model.is_file():
        raise InputError(f"{model} is not a file")
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder, "device.yaml")
        profile.write_text(device_yaml(device), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(model), "--device", str(profile)]
        for name, value in inputs.items():
            shape = "x".join(map(str, value.shape))
            command += ["--input", f"{name}={value.dtype.name}:{shape}"]
        runs = [_run_child(command) for _ in range(processes)]
    found, memory = _intervals(runs), [run["peak_memory_mb"] for run in runs]
    return ColdStart(
        processes=processes,
        import_ms=found.import_ms.value,
        load_ms=found.load_ms.value,
        first_run_ms=found.first_run_ms.value,
        peak_memory_mb=None if None in memory else statistics.median(memory),
        file_bytes=sum(file.stat().st_size for file in (model, *data_files(model))),
        intervals=found if processes > 1 else None,
    )


def _intervals(runs: Sequence[Mapping[str, float]]) -> "StartIntervals":
    """Average each step over the processes; the intervals of a single process mean nothing."""
    import numpy as np

    from edgeclip.profiles.record.measurement import StartIntervals
    from edgeclip.profiles.record.timing_statistics import latency_of

    def mean(*steps: str) -> "Interval":
        return latency_of([np.array([sum(run[step] for step in steps)]) for run in runs]).p50_ms

    return StartIntervals(
        import_ms=mean("import_ms"),
        load_ms=mean("load_ms"),
        first_run_ms=mean("first_run_ms"),
        total_ms=mean("import_ms", "load_ms", "first_run_ms"),
    )


def _run_child(command: list[str]) -> dict[str, Any]:
    """Run the command and parse the JSON in the last line that it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"a cold start took more than {_TIMEOUT_S} s: {command[3]}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = without_colour(done.stderr).strip().splitlines()
        why = said[-1] if said else f"exit status {done.returncode}"
        raise EngineError(f"a cold start of {command[3]} failed: {why}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _time_cold_start(model: Path, inputs: list[str], device_name: str) -> dict[str, float | None]:
    """Time import, load and first run in this process."""
    began = time.perf_counter()
    from edgeclip.runtime.device.device_profile import load_device

    device = load_device(device_name)
    import edgeclip.runtime.encoder  # noqa: F401  (imported for its cost)

    if device.engine.startswith("onnxruntime"):
        from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime

        import_onnxruntime()
    from edgeclip.profiles.sensors.machine_state import peak_memory_mb
    from edgeclip.runtime.engines.engine import open_engine

    imported = time.perf_counter()
    feeds = dict(_parse_input(item) for item in inputs)
    loading = time.perf_counter()
    engine = open_engine(model, device=device)
    loaded = time.perf_counter()
    engine.run(feeds)
    ran = time.perf_counter()
    return {
        "import_ms": 1e3 * (imported - began),
        "load_ms": 1e3 * (loaded - loading),
        "first_run_ms": 1e3 * (ran - loaded),
        "peak_memory_mb": peak_memory_mb(),
    }


def _parse_input(item: str) -> "tuple[str, NDArray[Any]]":
    """Make an input of ones from NAME=DTYPE:SHAPE; returns its name and value."""
    import numpy as np

    try:
        name, _, rest = item.partition("=")
        dtype, _, shape = rest.partition(":")
        return name, np.ones([int(side) for side in shape.split("x")], np.dtype(dtype))
    except (TypeError, ValueError):
        raise InputError(
            f"--input {item!r}: write NAME=DTYPE:SHAPE, such as pixel_values=float32:1x3x64x64"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """Measure this process's own cold start and print it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m edgeclip.profiles.measure.cold_start")
    parser.add_argument("model", type=Path, help="ONNX file")
    parser.add_argument("--input", action="append", required=True, metavar="NAME=DTYPE:SHAPE")
    parser.add_argument("--device", default="this-machine", help="name, or path of a YAML file")
    args = parser.parse_args(arguments)
    try:
        print(json.dumps(_time_cold_start(args.model, args.input, args.device)))
    except EdgeClipError as error:
        print(f"edgeclip: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
