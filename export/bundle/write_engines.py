"""Build TensorRT engines into a bundle; list which devices engines can be built for here."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import sha256_graph
from edgeclip.runtime.bundle.engine_records import EngineRecord, GraphSource, engine_path
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import DeviceProfile, device_names, load_device
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, open_library
from edgeclip.runtime.errors import EdgeClipError

_log = logging.getLogger(__name__)

BUILD_SCRIPT = "build_on_device.sh"


def can_build_ahead(device: DeviceProfile) -> tuple[TensorRtLibrary | None, str]:
    """Return the library that builds the device's engines here, or None and the reason."""
    if device.engine not in ("tensorrt", "tensorrt-rtx"):
        return None, f"{device.engine} needs no engines"
    try:
        library = open_library(device)
    except EdgeClipError as error:
        return None, str(error)
    obstacle = library.why_not_build(device)
    return (None, obstacle) if obstacle else (library, "")


def write_engines(
    folder: Path,
    graphs: Sequence[TowerGraph],
    device: DeviceProfile,
    context_length: int,
) -> tuple[EngineRecord, ...]:
    """Build the engines of the graphs into a bundle's folder, if this machine can.

    Otherwise a script is written that builds them on the device. A device that finds no engine for
    itself in a bundle builds one when it first needs it.

    Raises:
        EngineError: the library cannot read a graph or build its engine.
    """
    if device.engine not in ("tensorrt", "tensorrt-rtx"):
        return ()
    library, obstacle = can_build_ahead(device)
    if library is None:
        _log.info(
            "leaving %s, for engines must be built on the device: %s ...", BUILD_SCRIPT, obstacle
        )
        _write_script(folder / BUILD_SCRIPT, device)
        return ()
    records = []
    for graph in graphs:
        _log.info("building the engine of the %s tower with %s ...", graph.subject, library.title)
        source = _source(graph, context_length)
        built = build_engine(source, device=device, library=library)
        path = engine_path(source, built.key)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(built.engine)
        records.append(
            EngineRecord(tower=graph.tower, precision=graph.precision, path=path, key=built.key)
        )
    return tuple(records)


def _source(graph: TowerGraph, context_length: int) -> GraphSource:
    return GraphSource(
        name=graph.path.stem,
        content=graph.path,
        sha256=sha256_graph(graph.path),
        text_length=context_length if graph.tower == "text" else None,
    )


def _write_script(path: Path, device: DeviceProfile) -> None:
    """Write a POSIX shell script that builds the engines with edgeclip, without torch."""
    path.write_text(
        "#!/bin/sh\n"
        "# Builds this bundle's TensorRT engines on the device, and holds each against its\n"
        "# golden embeddings. Needs edgeclip and the device's own TensorRT, which a virtual\n"
        "# environment sees when it is made with --system-site-packages.\n"
        "set -eu\n"
        "command -v edgeclip >/dev/null || {\n"
        '    echo "edgeclip is not on the PATH: activate the environment that has it" >&2\n'
        "    exit 1\n"
        "}\n"
        'cd "$(dirname "$0")"\n'
        f"usual={shlex.quote(device.name)}\n"
        'edgeclip build . --device "${1:-$usual}"\n'
        'edgeclip verify . --device "${1:-$usual}"\n',
        encoding="utf-8",
    )
    path.chmod(0o755)


def targets_table() -> str:
    """List all known devices: engine, precisions, and what this machine can do for each."""
    rows = [("device", "engine", "precisions", "here")]
    for name in device_names():
        device = load_device(name)
        rows.append((name, device.engine, " ".join(device.precisions), build_support(device)))
    return columns(rows, left=4)


def build_support(device: DeviceProfile) -> str:
    """Say whether towers run here, engines can be built here, or the device is needed."""
    if device.engine.startswith("onnxruntime"):
        return _run_support(device)
    library, obstacle = can_build_ahead(device)
    if library is None:
        return f"graphs only, engines are built on the device: {obstacle}"
    return f"engines are built here, with {library.title}"


def _run_support(device: DeviceProfile) -> str:
    from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime
    from edgeclip.runtime.engines.providers import provider_of

    try:
        provider = provider_of(device)
        if provider.name not in import_onnxruntime().get_available_providers():
            return f"graphs only: this onnxruntime has no {provider.name}"
    except EdgeClipError as error:
        return f"graphs only: {error}"
    return "runs here" if device.name == "this-machine" else "runs here if the processor fits"
