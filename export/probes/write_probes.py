"""Write a set of probes: small towers with random weights, exported and quantized like any other.

Towers that differ in one kind of block only are written in pairs, so that the difference of
their times is the cost of that block, without the fixed cost of a run.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper
from tqdm import tqdm

from edgeclip.export.bundle.add_to_bundle import file_records
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.probes.probe_plan import (
    STANDARD,
    PlannedCheck,
    PlannedGraph,
    PlannedProbe,
    ProbePlan,
)
from edgeclip.export.probes.random_towers import (
    example,
    export_stem,
    input_name,
    quantize_random,
    random_dual,
)
from edgeclip.export.quantizing.config import default_config, needs_vnni
from edgeclip.profiles.predict.probe_set import (
    PROBES_NAME,
    WEIGHTS_NAME,
    CheckTower,
    GraphInput,
    Probe,
    ProbeIndex,
    ProbeSet,
)
from edgeclip.runtime.bundle.files import atomic_directory
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import InputError

_SHARED = 4096  # bytes; smaller weights stay in their graph
_PAGE = 4096
_FLOAT, _INT8 = int(TensorProto.FLOAT), int(TensorProto.INT8)
_DTYPES: dict[str, Literal["uint8", "float32", "int64"]] = {
    "uint8": "uint8",
    "float32": "float32",
    "int64": "int64",
}


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
        device: the device to write graphs for, in its form and its int8, as `edgeclip export` does.
        command: what was typed, for the record.
        plan: what is probed.
        seed: random seed of the weights.
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
    """Make all graphs read their large weights from one file of random numbers.

    Two weights of one graph never begin at the same place: ONNX Runtime packs equal weights only
    once, and such a graph would find more of them in the caches than a real one does.

    Returns the bytes of weights of each graph, by the name of its file.
    """
    paths = tuple(paths)
    ends = {_FLOAT: 0, _INT8: 0}
    for path in paths:
        for number, tensor in enumerate(_large(load_graph(path))):
            kind = tensor.data_type
            ends[kind] = max(ends[kind], number * _PAGE + _bytes(tensor))
    draw = np.random.default_rng(seed)
    floats = draw.normal(0, 0.02, -(-ends[_FLOAT] // 4)).astype(np.float32).tobytes()
    floats += bytes(-len(floats) % _PAGE)
    target.write_bytes(floats + draw.integers(-127, 128, ends[_INT8], np.int8).tobytes())
    starts = {_FLOAT: 0, _INT8: len(floats)}
    return {path.name: _refer(path, target.name, starts) for path in paths}


def _refer(path: Path, name: str, starts: Mapping[int, int]) -> int:
    """Refer a graph's large weights to the shared file; return the bytes of all its weights."""
    model = load_graph(path)
    size = sum(map(_bytes, model.graph.initializer))
    for number, tensor in enumerate(_large(model)):
        length, start = _bytes(tensor), starts[tensor.data_type] + number * _PAGE
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        external_data_helper.set_external_data(tensor, name, start, length)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString(deterministic=True))
    return size


def _write_graphs(plan: ProbePlan, folder: Path, device: DeviceProfile, seed: int) -> None:
    """Export every graph once; a tower's fp32 comes before its int8, which is made of it."""
    graphs = {item.graph.path: item.graph for item in _items(plan)}
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


def _items(plan: ProbePlan) -> tuple[PlannedProbe | PlannedCheck, ...]:
    return (*plan.probes(), *plan.check_towers())


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
        needs_vnni=needs_vnni(default_config("int8", device)),
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
            for item in plan.check_towers()
        ),
        files=file_records(folder),
    )


def _inputs(device: DeviceProfile, sizes: dict[str, int]) -> Callable[[PlannedGraph], GraphInput]:
    def given(graph: PlannedGraph) -> GraphInput:
        value = example(graph.tower, device)
        return GraphInput(
            path=graph.path,
            name=input_name(graph.tower, device),
            dtype=_DTYPES[value.dtype.name],
            shape=value.shape,
            weight_bytes=sizes[graph.path],
        )

    return given


def _large(model: onnx.ModelProto) -> list[TensorProto]:
    return [
        item
        for item in model.graph.initializer
        if item.data_type in (_FLOAT, _INT8) and _bytes(item) >= _SHARED
    ]


def _bytes(tensor: TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)
