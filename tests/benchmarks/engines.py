"""A CLIP ViT-B/32 of random weights: exported, quantized and built for SM89, time and memory.

Random weights tell nothing about quality, so the bound of retrieval is open; that every
graph computes what torch does, and every engine can be built, is what is looked at.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from _bars import Rule, finish, hold, options, say
from graph_work import random_vit_b32

from edgeclip.compress.data.open_source import open_source
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.profiles.sensors.machine_state import peak_memory_mb
from edgeclip.runtime.device.device_profile import load_device

BARS: dict[str, Rule] = {
    "engines_minutes": ("<=", 5, "min"),
    "engines_peak_memory": ("<=", 8, "GB"),
    "engines_built": (">=", 6, ""),
}

_CHILD = "--child"
_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}


def main() -> int:
    """Build in a process of its own, so that its peak memory is that of the work."""
    args = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, _CHILD, folder, str(int(args.quick))]
        began = time.perf_counter()
        found = json.loads(subprocess.check_output(words, text=True).splitlines()[-1])
        seconds = time.perf_counter() - began
    for engine, size in found["engines"].items():
        print(f"{engine:<72} {size / 1e6:8.1f} MB")
    bars = [
        hold(BARS, "engines_minutes", seconds / 60),
        hold(BARS, "engines_peak_memory", found["peak_memory_mb"] / 1000),
        hold(BARS, "engines_built", len(found["engines"])),
    ]
    return finish(bars, args.out)


def child(folder: Path, quick: bool) -> None:
    """Make the model and its bundle; print engines and peak memory as one line of JSON."""
    torch.manual_seed(0)
    dual = random_vit_b32(**(_SMALL if quick else {}))
    origin = Origin(
        name="random", teacher="none", student="random", command=__file__, licence="none"
    )
    plan = BundlePlan(
        student=dual,
        calibration=open_source("emoji", split="calibration", count=32, size=224),
        test=open_source("emoji", split="test", count=32, size=224),
        device=load_device("rtx-4000-ada"),
        origin=origin,
        bounds={name: replace(item, r1_loss=100.0) for name, item in DEFAULT_BOUNDS.items()},
        workload=None,
        accept_undecided=True,  # so few scenes tell that it works
    )
    built = build_bundle(plan, folder / "bundle")
    for reason in built.left_out:
        say(f"left out: {reason}")
    bytes_of = {file.path: file.bytes for file in built.bundle.manifest.files}
    engines = {item.path: bytes_of[item.path] for item in built.bundle.manifest.engines}
    print(json.dumps({"engines": engines, "peak_memory_mb": peak_memory_mb()}))


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        child(Path(sys.argv[2]), sys.argv[3] == "1")
    else:
        sys.exit(main())
