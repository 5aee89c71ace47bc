"""Write a set of probes: small towers with random weights, exported and quantized like any other.

Towers that differ in one kind of piece only are written in pairs, so that the difference of
their times is the cost of that piece, without what a run costs anyhow.
"""

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper
from tqdm import tqdm

from edgeclip.export.graph import load_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.probe_plan import STANDARD, PlannedGraph, ProbePlan
from edgeclip.export.quantize import Int8Settings
from edgeclip.export.random_towers import (
    example,
    export_stem,
    input_name,
    quantize_random,
    random_dual,
)
from edgeclip.export.to_onnx import export_tower
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.files import atomic_directory, sha256_file
from edgeclip.runtime.manifest import FileRecord
from edgeclip.runtime.measuring.probe_set import (
    PROBES_NAME,
    WEIGHTS_NAME,
    CheckTower,
    GraphInput,
    Probe,
    ProbeIndex,
    ProbeSet,
)

_SHARED = 4096  # bytes; smaller weights stay in their graph
_PAGE = 4096
_DTYPES = {TensorProto.FLOAT: np.dtype(np.float32), TensorProto.INT8: np.dtype(np.int8)}


def write_probes(
    out: Path,
    *,
    device: DeviceProfile,
    command: str,
    plan: ProbePlan = STANDARD,
    seed: int = 0,
    replace: bool = False,
) -> ProbeSet:
    """Write a set of probes; it exists whole or not at all.

    Args:
        out: the directory to make.
        device: for which graphs are written, as `edgeclip export` does; its int8 too.
        command: what was typed, for the record.
        plan: what is probed.
        seed: of the weights.
        replace: allow `out` to be a set of probes already.

    Raises:
        InputError: `out` may not be written, or the device runs no ONNX graphs.
        ExportError: torch cannot export a tower.
    """
    if not device.engine.startswith("onnxruntime"):
        raise InputError(
            f"device {device.name!r} runs engines of its own, not ONNX graphs: probes are for "
            "ONNX Runtime; choose a device whose engine is one of ONNX Runtime's"
        )
    with atomic_directory(out, replace=replace, marker=PROBES_NAME) as folder:
        _write_graphs(plan, folder, device, seed)
        sizes = share_weights(sorted(folder.glob("*.onnx")), folder / WEIGHTS_NAME, seed)
        index = _index(plan, folder, device, command, seed, sizes)
        index.save(folder / PROBES_NAME)
    return ProbeSet.open(out)


def share_weights(paths: Iterable[Path], target: Path, seed: int) -> dict[str, int]:
    """Let all graphs read their large weights from one file of random numbers.

    Returns the bytes of weights of each graph, by the name of its file.
    """
    paths = tuple(paths)
    largest = dict.fromkeys(_DTYPES, 0)
    for path in paths:
        for tensor in _large(load_graph(path)):
            largest[tensor.data_type] = max(largest[tensor.data_type], _bytes(tensor))
    draw = np.random.default_rng(seed)
    floats = draw.normal(0, 0.02, -(-largest[TensorProto.FLOAT] // 4)).astype(np.float32).tobytes()
    floats += bytes(-len(floats) % _PAGE)
    integers = draw.integers(-127, 128, largest[TensorProto.INT8], np.int8).tobytes()
    target.write_bytes(floats + integers)
    offsets = {TensorProto.FLOAT: 0, TensorProto.INT8: len(floats)}
    sizes = {}
    for path in paths:
        model = load_graph(path)
        sizes[path.name] = sum(map(_bytes, model.graph.initializer))
        for tensor in _large(model):
            length = _bytes(tensor)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
            external_data_helper.set_external_data(
                tensor, target.name, offsets[tensor.data_type], length
            )
            tensor.ClearField("raw_data")
        path.write_bytes(model.SerializeToString(deterministic=True))
    return sizes


def _write_graphs(plan: ProbePlan, folder: Path, device: DeviceProfile, seed: int) -> None:
    """Export every graph once; a tower's fp32 comes before its int8, which is made of it."""
    graphs = {item.graph.path: item.graph for item in (*plan.probes(), *plan.whole())}
    ordered = sorted(graphs.values(), key=lambda item: item.precision)
    for graph in tqdm(ordered, desc="probes", disable=not sys.stderr.isatty()):
        path = folder / graph.path
        if graph.precision == "int8":
            reference = PlannedGraph(graph.tower, "fp32").path
            quantize_random(folder / reference, path, graph.tower, device, seed=seed)
            continue
        dual = random_dual(graph.tower, seed=seed)
        if graph.stem:
            export_stem(dual, path, device)
        else:
            export_tower(dual, graph.tower.part, path, GraphForm.for_device(device))


def _index(
    plan: ProbePlan,
    folder: Path,
    device: DeviceProfile,
    command: str,
    seed: int,
    sizes: dict[str, int],
) -> ProbeIndex:
    given = _inputs(device, sizes)
    return ProbeIndex(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        device=device.name,
        needs_vnni=Int8Settings.for_device(device).needs_vnni,
        seed=seed,
        probes=tuple(
            Probe(
                name=item.name,
                precision=item.graph.precision,
                graph=given(item.graph),
                piece=item.piece,
                count=item.count,
                beyond=item.beyond,
                few=item.few,
            )
            for item in plan.probes()
        ),
        checks=tuple(
            CheckTower(
                name=item.name,
                precision=item.graph.precision,
                graph=given(item.graph),
                parts=item.graph.tower.parts(),
                few=item.few,
            )
            for item in plan.whole()
        ),
        files=tuple(
            FileRecord(path.name, path.stat().st_size, sha256_file(path))
            for path in sorted(folder.iterdir())
        ),
    )


def _inputs(device: DeviceProfile, sizes: dict[str, int]) -> Callable[[PlannedGraph], GraphInput]:
    def given(graph: PlannedGraph) -> GraphInput:
        value = example(graph.tower, device)
        return GraphInput(
            path=graph.path,
            name=input_name(graph.tower, device),
            dtype=value.dtype.name,
            shape=value.shape,
            weight_bytes=sizes[graph.path],
        )

    return given


def _large(model: onnx.ModelProto) -> list[TensorProto]:
    return [
        item
        for item in model.graph.initializer
        if item.data_type in _DTYPES and _bytes(item) >= _SHARED
    ]


def _bytes(tensor: TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)
