"""Quantize a tower to static int8: Q/DQ around products with constant weights."""

import shutil
import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import (
    PRODUCTS,
    constant_names,
    data_path,
    load_graph,
    save_graph,
    write_typed,
)
from edgeclip.export.graph.graph_values import GraphEdit
from edgeclip.export.quantizing.activation_ranges import (
    EXTREMES,
    activation_ranges,
    cache_file,
    quiet,
    save_ranges,
)
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import final_norm_nodes
from edgeclip.export.quantizing.symmetric_qdq import INT8, write_symmetric
from edgeclip.runtime.bundle.files import atomic_file


def restore_float_readers(model: onnx.ModelProto) -> None:
    """Connect nodes that are not quantized back to the float value before Q/DQ, in place.

    ONNX Runtime's quantizer gives the rounded value to all readers, such as the residual sum
    behind a norm of a BERT: its whole residual stream then has 8 bits, and no operator is faster
    for it. Chains of convolutions are left alone, where sums are int8 too.
    """
    edit = GraphEdit(model)
    for node in model.graph.node:
        quantizer = edit.maker(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        value, rounded = quantizer.input[0], node.output[0]
        readers, maker = edit.readers(rounded), edit.maker(value)
        around = [*readers, maker] if maker is not None else readers
        if any(item.op_type == "Conv" for item in around):
            continue
        for reader in readers:
            if not _is_quantized(edit, reader):
                names = [value if name == rounded else name for name in reader.input]
                reader.input[:] = names


def _is_quantized(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Return whether a node is a product with an int8 weight."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    weight = edit.maker(node.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def write_int8(
    source: Path,
    target: Path,
    data: CalibrationData,
    config: StaticInt8,
    *,
    cache: Path | None = None,
) -> None:
    """Quantize the MatMul, Gemm and Conv nodes of an fp32 tower, with ranges found on `data`.

    Smoothing and int8 token tables are done by `quantize_graph`, before and after this.

    Args:
        source, target: the ONNX files.
        data: calibration inputs.
        config: how it is quantized.
        cache: a folder for ranges, used with this data only.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    able = quantizable_nodes(source)
    nodes = [name for name in able if name not in config.kept]
    if not nodes:
        raise ExportError(f"{source.name}: everything that could be quantized is to stay in float")
    if config.symmetric:
        write_symmetric(
            source,
            target,
            data,
            nodes=nodes,
            number_format=INT8,
            half=config.float_precision == "fp16",
            ranging=config.ranging,
            per_channel=config.per_channel,
            cache=cache,
        )
        return
    with tempfile.TemporaryDirectory() as folder, quiet():
        ranges = Path(folder) / "ranges.json"
        found = None if cache is None else cache_file(cache, source, "typed ranges", config.ranging)
        if found is not None and found.exists():
            shutil.copyfile(found, ranges)
        elif config.ranging != EXTREMES:
            save_ranges(activation_ranges(source, data, config.ranging, able), ranges)
        _write_asymmetric(source, target, data, config, nodes, ranges)
        if found is not None and not found.exists():
            with atomic_file(found) as temporary:
                shutil.copyfile(ranges, temporary)


def _write_asymmetric(
    source: Path,
    target: Path,
    data: CalibrationData,
    config: StaticInt8,
    nodes: list[str],
    ranges: Path,
) -> None:
    """Quantize for ONNX Runtime's CPU kernels: uint8 activations, int32 biases.

    Ranges are read from the file `ranges`; if it does not exist, the extremes are found on `data`
    and written to it.
    """
    reader = data.reader(onnx.load(source, load_external_data=False).graph.input[0].name)
    raw = ranges.with_name("int8.onnx")
    typed = write_typed(source, ranges.with_name("typed.onnx"))
    quantize_static(
        typed,
        raw,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(PRODUCTS),
        nodes_to_quantize=nodes,
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=data_path(typed).exists(),
        calibrate_method=CalibrationMethod.MinMax,
        calibration_cache_path=ranges,
        extra_options={
            "ActivationSymmetric": False,
            "WeightSymmetric": True,
            # Their outputs go to float operators: int8 would only lose accuracy.
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            "CalibStridedMinMax": 1,  # batch by batch, or memory grows with the data
        },
    )
    model = load_graph(raw)
    restore_float_readers(model)
    save_graph(model, target)


def quantizable_nodes(source: Path) -> list[str]:
    """Return the names of the products with constant weights that can be quantized, in order.

    Left out are depthwise convolutions, which are no faster in int8; patch embeddings, a small
    part of the work whose error goes through all layers; and what follows the final L2 norm,
    such as a label head.

    Raises:
        ExportError: there is none.
    """
    model = onnx.load(source, load_external_data=False)
    constants = constant_names(model)
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    behind_norm = final_norm_nodes(model.graph)
    names = [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS
        and node.input[1] in constants
        and node.name not in behind_norm
        and not (node.op_type == "Conv" and _stays_float(node, shapes[node.input[1]]))
    ]
    if not names:
        raise ExportError(f"{source.name} has no MatMul, Gemm or Conv with constant weights")
    return names


def _stays_float(node: onnx.NodeProto, weight: tuple[int, ...]) -> bool:
    """Return whether a convolution is depthwise or a patch embedding (kernel equal to stride).

    `weight` is the shape [outputs, inputs of a group, *kernel].
    """
    settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    kernel = list(weight[2:])
    depthwise = settings.get("group", 1) > 1 and weight[1] == 1
    return depthwise or (max(kernel) > 1 and kernel == settings.get("strides"))
