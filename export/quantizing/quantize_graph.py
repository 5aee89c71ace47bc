"""Quantize or convert an fp32 tower as a config says: one config in, one ONNX file out."""

import tempfile
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
from edgeclip.export.quantizing.dynamic_int8 import quantize_token_tables, write_dynamic_int8
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.export.quantizing.smoothquant import apply_smoothing
from edgeclip.export.quantizing.static_int8 import quantizable_nodes, write_int8
from edgeclip.export.quantizing.symmetric_qdq import FLOAT8, write_symmetric
from edgeclip.export.quantizing.weight_only import write_weight_only


def quantize_graph(
    source: Path,
    target: Path,
    config: Config,
    data: CalibrationData,
    *,
    cache: Path | None = None,
) -> None:
    """Write an fp32 tower in the precision of a config; the same arguments give the same bytes.

    Args:
        source, target: the ONNX files.
        config: the precision and its settings.
        data: calibration inputs.
        cache: a folder for ranges, which other configs of the same graph reuse. It must be used
            with this data only.

    Raises:
        ExportError: the config names nodes that the graph does not have, nothing in it can be
            quantized so, or the result is not valid ONNX.
    """
    check_node_names(source, config)
    match config:
        case Float32():
            save_graph(load_graph(source), target)
        case Float16():
            write_fp16(source, target, data, islands=config.islands, cache=cache)
        case Float8():
            nodes = [name for name in quantizable_nodes(source) if name not in config.kept]
            write_symmetric(
                source, target, data, nodes=nodes, number_format=FLOAT8, half=True, cache=cache
            )
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


def check_node_names(source: Path, config: Config) -> None:
    """Check that a graph has all nodes that a config names.

    Raises:
        ExportError: it lacks some.
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
        if config.smoothing:
            plain = Path(folder) / source.name
            model = load_graph(source)
            apply_smoothing(model, config.smoothing, data)
            save_graph(model, plain)
        write_int8(plain, target, data, config, cache=cache)
    if config.int8_tables:
        model = load_graph(target)
        quantize_token_tables(model, config.kept)
        save_graph(model, target)
