"""Static int8: explicit Q/DQ around the products with constant weights, and nothing else.

Weights are symmetric int8 with one scale for each output channel. Softmax, LayerNorm, Add
and the products of attention (QK^T and AV) stay in float: quantizing those is what makes
vision transformers collapse.

Measured with ONNX Runtime on one CPU core at batch 1, as shares of the time in fp32: a
ResNet takes 0.39, or 1.01 if the results of its convolutions stay float, because there is
no kernel for that; a ConvNext takes 0.62, or 0.65 with its depthwise convolutions in int8.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.errors import ExportError
from edgeclip.export.graph import constant_names, save_graph
from edgeclip.profiles.device import DeviceProfile

_OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Settings:
    """How a tower is quantized for an engine.

    Attributes:
        symmetric: activations are signed with zero point 0, as TensorRT asks. ONNX Runtime
            is faster and more exact with unsigned, asymmetric ones.
        reduce_range: weights take 7 bits, because 8-bit products can saturate on a CPU
            without int8 dot products.
        method: how the range of an activation follows from what calibration saw.
    """

    symmetric: bool
    reduce_range: bool
    method: CalibrationMethod = CalibrationMethod.MinMax

    @property
    def needs_vnni(self) -> bool:
        """Whether the products overflow on a CPU without int8 dot products."""
        return not self.symmetric and not self.reduce_range

    @classmethod
    def for_device(cls, device: DeviceProfile) -> "Int8Settings":
        """Return what suits the device's engine."""
        on_cpu = device.engine == "onnxruntime-cpu"
        return cls(symmetric=not on_cpu, reduce_range=on_cpu and not device.vnni)


def write_int8(source: Path, target: Path, data: CalibrationData, settings: Int8Settings) -> None:
    """Quantize an fp32 tower by what it sees in `data`.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    model = onnx.load(source)
    nodes = quantizable_nodes(model)
    if not nodes:
        raise ExportError(f"{source.name} has no MatMul, Gemm or Conv with constant weights")
    kind = QuantType.QInt8 if settings.symmetric else QuantType.QUInt8
    with tempfile.TemporaryDirectory() as folder, _quiet():
        raw = Path(folder) / "int8.onnx"
        quantize_static(
            source,
            raw,
            data.reader(model.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=settings.reduce_range,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            calibrate_method=settings.method,
            extra_options={
                "ActivationSymmetric": settings.symmetric,
                "WeightSymmetric": True,
                # Their results go to float operators: int8 would only lose accuracy.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "CalibStridedMinMax": 1,  # batch by batch, or memory grows with the data
            },
        )
        save_graph(onnx.load(raw), target)


def quantizable_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes whose second input is a constant weight, in graph order.

    Among convolutions these are the dense, overlapping ones. A depthwise one is no faster
    in int8, and patches are a small part of the work whose error goes through all layers.
    """
    constants = constant_names(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _OPERATORS and node.input[1] in constants and not _spared(node)
    ]


def _spared(node: onnx.NodeProto) -> bool:
    """Tell whether a node is a depthwise convolution, or one that cuts patches."""
    settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    cuts_patches = settings.get("kernel_shape") == settings.get("strides", [])
    return node.op_type == "Conv" and (settings.get("group", 1) > 1 or cuts_patches)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back advice on steps that `save_graph` has done already."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
