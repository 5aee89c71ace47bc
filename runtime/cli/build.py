"""`edgeclip build`: compile a bundle's towers for the device it runs on.

TensorRT engines are kept in this machine's cache for later starts. With an execution provider of
ONNX Runtime the result is written as ONNX files (EP contexts), which other programs can load.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.options import Targets
from edgeclip.runtime.engines.onnxruntime_engine import embed_context
from edgeclip.runtime.engines.providers import provider_of
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import open_tower, usable_precisions

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile

CompileTower = Callable[[Bundle, Tower, Precision], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--device",
        required=True,
        help="name of a device whose engine compiles graphs, or its YAML file",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the EP contexts, if the engine is a provider of ONNX Runtime",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=get_args(Precision),
        help="may be given several times (default: all that bundle and device have in common)",
    )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(folders=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Compile each tower; return 1 if one cannot be compiled or computes wrongly."""
    from edgeclip.runtime.device.device_profile import load_device

    device = load_device(args.device)
    compile_tower = _compiler(device, args.out)
    bundle = Bundle.open(args.bundle)
    failed = False
    for tower in (item.tower for item in bundle.manifest.towers):
        for precision in _precisions(bundle, tower, device, args.precision):
            began = time.perf_counter()
            try:
                compile_tower(bundle, tower, precision)
                print(f"{tower} {precision}: ready in {time.perf_counter() - began:.0f} s")
            except EngineError as error:
                failed = True
                print(f"{tower} {precision}: {error}")
    return 1 if failed else 0


def _compiler(device: "DeviceProfile", out: Path | None) -> CompileTower:
    """Return the function that compiles a tower for the device's engine."""
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        return lambda bundle, tower, precision: open_tower(bundle, tower, precision, device)
    if not provider_of(device).has_context:
        raise InputError(
            f"device {device.name!r} runs {device.engine}, which needs no engines: use the bundle "
            "as it is"
        )
    if out is None:
        raise InputError(
            f"device {device.name!r} runs {device.engine}, which compiles when it starts; to "
            "keep the result as ONNX files, name a folder with --out"
        )

    def embed(bundle: Bundle, tower: Tower, precision: Precision) -> None:
        graph = bundle.tower_path(tower, precision)
        length = bundle.manifest.spec.text.context_length if tower == "text" else None
        target = out / f"{graph.stem}_ctx.onnx"
        embed_context(graph, device=device, target=target, context_length=length)

    return embed


def _precisions(
    bundle: Bundle, tower: Tower, device: "DeviceProfile", asked: list[Precision] | None
) -> tuple[Precision, ...]:
    usable = usable_precisions(bundle.manifest.tower(tower), device)
    wanted = tuple(item for item in usable if asked is None or item in asked)
    if not wanted:
        raise InputError(
            f"device {device.name!r} can run none of the asked precisions of the {tower} tower: "
            f"choose from {', '.join(usable) or 'another bundle'}"
        )
    return wanted
