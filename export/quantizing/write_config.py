"""Write a tower in any precision from its fp32 graph: one config in, one file out."""

import tempfile
from collections.abc import Collection
from pathlib import Path

import onnx

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
)
from edgeclip.export.quantizing.dynamic_int8 import store_tables, write_dynamic_int8
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.smooth import smooth
from edgeclip.export.quantizing.static_int8 import quantizable_nodes, write_int8
from edgeclip.export.quantizing.symmetric import FLOAT8, write_symmetric
from edgeclip.export.quantizing.weight_only import write_weight_only


def apply_transforms(
    model: onnx.ModelProto, config: StaticInt8, data: CalibrationData
) -> onnx.ModelProto:
    """Return a copy that is equalised and smoothed as a config says.

    Equalising comes first: smoothing looks at the weights that it leaves.

    Args:
        model: a tower in fp32, its weights in memory.
        config: says what is done. Biases are corrected later (`correct_biases`).
        data: shows how large the channels become.

    Raises:
        ExportError: a node that is to be smoothed cannot be.
        EngineError: the graph cannot be run here.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if config.equalised:
        equalise(changed)
    if config.smoothing:
        smooth(changed, config.smoothing, data)
    return changed


def write_fp8(
    source: Path,
    target: Path,
    data: CalibrationData,
    *,
    kept: Collection[str] = (),
    cache: Path | None = None,
) -> None:
    """Quantize an fp32 tower to float8 by what it sees in `data`.

    The graph is raised to operator set 21, unless its own is higher. Nodes named in `kept`
    are not quantized. `cache` is a folder for ranges that were found, which belongs to this
    data alone.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    nodes = [name for name in quantizable_nodes(source) if name not in kept]
    write_symmetric(source, target, data, nodes=nodes, grid=FLOAT8, half=True, cache=cache)


def write_config(
    source: Path,
    target: Path,
    config: Config,
    data: CalibrationData,
    *,
    cache: Path | None = None,
) -> None:
    """Turn an fp32 tower into what a config says; the same arguments give the same bytes.

    Args:
        source, target: the ONNX files.
        config: what is made.
        data: what the tower sees while ranges are found.
        cache: a folder for ranges that were found, which later configs of the same graph read.
            It belongs to this data alone.

    Raises:
        ExportError: the config names nodes that the graph does not have, nothing in it can be
            quantized so, or the result is not valid ONNX.
    """
    refuse_unknown(source, config)
    match config:
        case Float32():
            save_graph(load_graph(source), target)
        case Float16():
            write_fp16(source, target, data, islands=config.islands, cache=cache)
        case Float8():
            write_fp8(source, target, data, kept=config.kept, cache=cache)
        case StaticInt8():
            _write_static(source, target, config, data, cache)
        case DynamicInt8():
            write_dynamic_int8(
                source,
                target,
                reduce_range=config.reduce_range,
                kept=config.kept,
                int8_tables=config.int8_tables,
            )
        case WeightOnly():
            write_weight_only(
                source, target, bits=config.bits, block=config.block, kept=config.kept
            )


def refuse_unknown(source: Path, config: Config) -> None:
    """Stop if a config names nodes that a graph does not have.

    Raises:
        ExportError: it does.
    """
    named: tuple[str, ...] = ()
    match config:
        case Float16():
            named = config.islands
        case StaticInt8():
            named = (*config.kept, *(name for name, _ in config.smoothing))
        case DynamicInt8() | WeightOnly() | Float8():
            named = config.kept
        case Float32():
            return
    have = {node.name for node in onnx.load(source, load_external_data=False).graph.node}
    unknown = [name for name in dict.fromkeys(named) if name not in have]
    if unknown:
        raise ExportError(
            f"{source.name} has no node named {', '.join(unknown)}: name nodes of the fp32 graph"
        )


def _write_static(
    source: Path, target: Path, config: StaticInt8, data: CalibrationData, cache: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = source
        if config.smoothing or config.equalised:
            plain = Path(folder) / source.name
            save_graph(apply_transforms(load_graph(source), config, data), plain)
        write_int8(plain, target, data, config, cache=cache)
        if config.bias_corrected:
            save_graph(correct_biases(load_graph(target), load_graph(plain), data), target)
    if config.int8_tables:
        model = load_graph(target)
        store_tables(model, config.kept)
        save_graph(model, target)
