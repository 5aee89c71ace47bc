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
from typing import Any

from _bars import Bar, finish, options

_CHILD = "--child"
_TOWERS = ("vision_config", "text_config")  # the defaults of CLIPConfig are ViT-B/32's
_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}


def main() -> int:
    """Build in a process of its own, so that its peak memory is that of the work."""
    parser = options(__doc__ or "")
    parser.add_argument("--device", default="rtx-4000-ada", help="a device with TensorRT-RTX")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, _CHILD, folder, args.device, str(int(args.quick))]
        began = time.perf_counter()
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
    if child.returncode != 0:
        return child.returncode
    found = json.loads(child.stdout.splitlines()[-1])
    for engine, size in found["engines"].items():
        print(f"{engine:<72} {size / 1e6:8.1f} MB")
    bars = [
        Bar(name="engines_minutes", value=seconds / 60, direction="<=", bound=5, unit="min"),
        Bar(
            name="engines_peak_memory",
            value=found["peak_memory_mb"] / 1000,
            direction="<=",
            bound=8,
            unit="GB",
        ),
        Bar(name="engines_built", value=len(found["engines"]), direction=">=", bound=6),
    ]
    return finish(bars, args.out)


def child(folder: Path, device_name: str, quick: bool) -> None:
    """Make the model and its bundle; print engines and peak memory as one line of JSON."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from edgeclip.compress.built_in import BUILT_IN_TEACHER
    from edgeclip.compress.data.sources import open_source
    from edgeclip.compress.teachers.dual_encoder import DualEncoder
    from edgeclip.export.bundle.build_bundle import build_bundle
    from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
    from edgeclip.export.gates.gates import DEFAULT_BOUNDS
    from edgeclip.profiles.sensors.machine_state import peak_memory_mb
    from edgeclip.runtime.device.device_profile import load_device
    from edgeclip.runtime.spec import ImageSpec

    torch.manual_seed(0)
    tokenizer = DualEncoder.load(BUILT_IN_TEACHER).tokenizer
    sizes: dict[str, Any] = {tower: dict(_SMALL if quick else {}) for tower in _TOWERS}
    sizes["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    config = CLIPConfig(**sizes)
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=224, resize=224, mean=half, std=half)
    dual = DualEncoder(CLIPModel(config).eval(), image, tokenizer)
    built = build_bundle(
        BundlePlan(
            student=dual,
            space=dual.space,
            calibration=open_source("emoji", split="calibration", count=32, size=224),
            test=open_source("emoji", split="test", count=32, size=224),
            device=load_device(device_name),
            origin=Origin(
                name="random", teacher="none", student="random", command=__file__, licence="none"
            ),
            bounds={name: replace(item, r1_loss=100.0) for name, item in DEFAULT_BOUNDS.items()},
            workload=None,
        ),
        folder / "bundle",
    )
    for reason in built.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    bytes_of = {file.path: file.bytes for file in built.bundle.manifest.files}
    engines = {item.path: bytes_of[item.path] for item in built.bundle.manifest.engines}
    print(json.dumps({"engines": engines, "peak_memory_mb": peak_memory_mb()}))


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
    else:
        sys.exit(main())
