"""Export the towers of a dual encoder to ONNX in fp32, with torch's exporter."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from optimum.exporters.base import ExporterConfig
from optimum.utils import (
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
    NormalizedTextConfig,
    NormalizedVisionConfig,
)
from torch import Tensor, nn

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.fold_norms import fold_batch_norms
from edgeclip.export.graph.graph_io import limit_masks, load_graph, save_graph
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.spec import (
    LABEL_OUTPUTS,
    OUTPUT_NAMES,
    PATCH_OUTPUT,
    PIXEL_INPUTS,
    TEXT_INPUT,
    ImageSpec,
    PixelForm,
    Tower,
)

# LayerNormalization is one operator since 17, and 18 is what most runtimes read.
PLAIN_OPSET = 18
# Since 19, scales of quantization may be fp16 and quantized values float8. TensorRT 10.0
# reads up to 20.
TENSORRT_OPSET = 19

_SAMPLES = 2  # the exporter would take a batch of 1 for a constant
_INTERCHANGE, _DEVICE = PIXEL_INPUTS["float32-nchw"], PIXEL_INPUTS["uint8-nhwc"]
_FLOATS, _CHANNELS_FIRST = f"{_DEVICE}_float", f"{_DEVICE}_nchw"

Axes = dict[str, dict[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphForm:
    """The form of an exported graph: operator set, input, batch size, extra outputs.

    Attributes:
        opset: version of the ONNX operator set.
        pixels: the input form of an image tower.
        batch: the fixed batch size; None if the batch size is free.
        patch_features: whether an image tower also outputs the last hidden state of each patch.
    """

    opset: int = PLAIN_OPSET
    pixels: PixelForm = "float32-nchw"
    batch: int | None = None
    patch_features: bool = False

    @classmethod
    def for_device(cls, device: DeviceProfile, *, patch_features: bool = False) -> "GraphForm":
        """Return the form for a device."""
        return cls(
            opset=TENSORRT_OPSET if "tensorrt" in device.engine else PLAIN_OPSET,
            pixels=device.pixels,
            batch=device.static_batch,
            patch_features=patch_features,
        )


# What other runtimes, such as transformers.js and optimum, expect.
INTERCHANGE_FORM = GraphForm()


@dataclass(frozen=True, slots=True)
class TowerPaths:
    """The ONNX files of both towers in fp32, and the input form of the image tower."""

    image: Path
    text: Path
    pixels: PixelForm

    def graph(self, tower: Tower) -> TowerGraph:
        """Return the graph of one tower."""
        if tower == "image":
            return TowerGraph("image", "fp32", self.image, self.pixels)
        return TowerGraph("text", "fp32", self.text, None)


def export_towers(
    dual: DualEncoder, folder: Path, form: GraphForm = INTERCHANGE_FORM
) -> TowerPaths:
    """Export both towers in fp32, named as in a bundle: `onnx/text_model.onnx` and so on.

    Raises:
        ExportError: torch cannot capture the model, or a graph is not what it should be.
    """
    paths = TowerPaths(
        folder / tower_path("image", "fp32", form.pixels),
        folder / tower_path("text", "fp32"),
        form.pixels,
    )
    export_tower(dual, "image", paths.image, form)
    export_tower(dual, "text", paths.text, form)
    return paths


def export_tower(
    dual: DualEncoder, tower: Tower, path: Path, form: GraphForm = INTERCHANGE_FORM
) -> None:
    """Export one tower in fp32; texts have a dynamic length.

    The image tower maps `pixel_values` float32 [batch, 3, size, size], or `pixels` uint8
    [batch, size, size, 3], to `image_embeds` float32 [batch, dim] and on request to
    `patch_features` float32 [batch, rows, columns, width]; the text tower `input_ids` int64
    [batch, length] to `text_embeds`. Embeddings are L2-normalised. `dual` is left in
    evaluation mode.

    Raises:
        ExportError: torch cannot capture the model, or the graph is not what it should be.
    """
    dual.eval()
    config = tower_config(dual, tower, form)
    model = capture(dual, tower, form).model_proto
    limit_masks(model)
    fold_batch_norms(model)
    _check_inputs(tower, model, config)
    _check_layer_norms(dual, tower, model)
    if tower == "image" and form.pixels == "uint8-nhwc":
        to_device_form(model, dual.image_spec)
    save_graph(model, path)


def _check_inputs(tower: Tower, model: onnx.ModelProto, config: "TowerConfig") -> None:
    """Refuse a graph with a batch size or text length that the exporter has silently fixed."""
    shape = model.graph.input[0].type.tensor_type.shape
    dynamic = [axis for axis, dim in enumerate(shape.dim) if dim.dim_param]
    (axes,) = config.inputs.values()
    if dynamic != list(axes):
        raise ExportError(
            f"the {tower} tower was exported for fixed sizes: its forward pass must take batch "
            "and text length from tensor shapes, not as Python numbers"
        )


def _check_layer_norms(dual: DualEncoder, tower: Tower, model: onnx.ModelProto) -> None:
    """Refuse LayerNorms decomposed into means and powers, which overflow in fp16."""
    prefixes = dual.tower_parts(tower)
    has_any = any(
        isinstance(part, torch.nn.LayerNorm) and name.startswith(prefixes)
        for name, part in dual.named_modules()
    )
    kinds = {node.op_type for node in model.graph.node}
    powers = {name for node in model.graph.node if node.op_type == "Pow" for name in node.output}
    variance = any(
        node.op_type == "ReduceMean" and node.input[0] in powers for node in model.graph.node
    )
    if variance or (has_any and "LayerNormalization" not in kinds):
        raise ExportError(
            f"the {tower} tower's layer normalisation was not exported as LayerNormalization, "
            "and would overflow in fp16: use torch.nn.LayerNorm in the model"
        )


class ImageTowerConfig(ExporterConfig):  # type: ignore[misc] # optimum is untyped
    """Inputs, outputs and sample of an image tower, for torch's exporter."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig.with_args(image_size="size")
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    def __init__(self, dual: DualEncoder, form: GraphForm) -> None:
        super().__init__(dual.image_spec, task="feature-extraction")
        self._form = form

    @property
    def inputs(self) -> Axes:
        """Names of the inputs, and of their dynamic axes."""
        return {PIXEL_INPUTS["float32-nchw"]: _batch_axis(self._form)}

    @property
    def outputs(self) -> Axes:
        """Names of the outputs, and of their dynamic axes."""
        names = [OUTPUT_NAMES["image"], *([PATCH_OUTPUT] if self._form.patch_features else [])]
        return {name: _batch_axis(self._form) for name in names}

    def sample(self) -> Tensor:
        """Return an input to trace with, float32 [batch, 3, size, size]."""
        return _sample(self, self._form)


class TextTowerConfig(ExporterConfig):  # type: ignore[misc] # as above
    """Inputs, outputs and sample of a text tower, for torch's exporter."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    def __init__(self, dual: DualEncoder, form: GraphForm) -> None:
        super().__init__(dual.spec.text, task="feature-extraction")
        self._form = form
        # Any length but the whole context, which the exporter would take for a constant.
        self._length = dual.spec.text.context_length - 1

    @property
    def inputs(self) -> Axes:
        """Names of the inputs, and of their dynamic axes."""
        return {TEXT_INPUT: {**_batch_axis(self._form), 1: "length"}}

    @property
    def outputs(self) -> Axes:
        """Names of the outputs, and of their dynamic axes."""
        return {OUTPUT_NAMES["text"]: _batch_axis(self._form)}

    def sample(self) -> Tensor:
        """Return an input to trace with, int64 [batch, length]."""
        return _sample(self, self._form, sequence_length=self._length)


TowerConfig = ImageTowerConfig | TextTowerConfig


def tower_config(dual: DualEncoder, tower: Tower, form: GraphForm) -> TowerConfig:
    """Return the exporter's config of a tower in a form."""
    return ImageTowerConfig(dual, form) if tower == "image" else TextTowerConfig(dual, form)


def _batch_axis(form: GraphForm) -> dict[int, str]:
    return {0: "batch"} if form.batch is None else {}


def _sample(config: Any, form: GraphForm, **sizes: int) -> Tensor:
    made = config.generate_dummy_inputs(batch_size=form.batch or _SAMPLES, **sizes)
    (value,) = made.values()
    assert isinstance(value, torch.Tensor)
    return value


def capture(
    dual: DualEncoder, tower: Tower, form: GraphForm, module: nn.Module | None = None
) -> torch.onnx.ONNXProgram:
    """Capture one tower with torch's exporter; pixels are normalised float32.

    Args:
        dual: both towers.
        tower: the one to capture.
        form: operator set, batch and outputs; the input form is not read.
        module: computes the tower; by default `tower_module`.

    Raises:
        ExportError: torch cannot capture the model.
    """
    config = tower_config(dual, tower, form)
    limits = {"length": {"min": 2, "max": dual.spec.text.context_length}}
    (axes,) = config.inputs.values()
    shapes = {axis: torch.export.Dim(name, **limits.get(name, {})) for axis, name in axes.items()}
    if module is None:
        module = tower_module(dual, tower, patch_features=form.patch_features)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (config.sample().to(dual.device),),
                input_names=list(config.inputs),
                output_names=list(config.outputs),
                opset_version=form.opset,
                dynamic_shapes=(shapes,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many classes, all with a long report
        raise ExportError(f"torch cannot export the {tower} tower: {first_line(error)}") from error
    assert program is not None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages on optional packages and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def to_device_form(model: onnx.ModelProto, spec: ImageSpec) -> None:
    """Change the input of a captured fp32 image tower to uint8 [batch, size, size, 3], in place.

    The normalisation is folded into the first convolution, or added as two nodes.
    """
    graph = model.graph
    given = graph.input[0]
    batch = given.type.tensor_type.shape.dim[0]
    scale = (1 / (255 * np.asarray(spec.std))).astype(np.float32)
    shift = (-np.asarray(spec.mean) / np.asarray(spec.std)).astype(np.float32)
    asking = [node for node in graph.node if _INTERCHANGE in node.input]
    readers = [node for node in asking if node.op_type != "Shape"]
    before = [
        # TensorRT reads uint8 in nothing but a cast at the graph's edge.
        helper.make_node("Cast", [_DEVICE], [_FLOATS], "pixels_cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Transpose", [_FLOATS], [_CHANNELS_FIRST], "pixels_transpose", perm=[0, 3, 1, 2]
        ),
    ]
    if len(readers) == 1 and _foldable(graph, readers[0]):
        _fold(graph, readers[0], scale, shift)
        for node in asking:  # the other readers only ask for the batch size
            node.input[:] = [
                _CHANNELS_FIRST if name == _INTERCHANGE else name for name in node.input
            ]
    else:
        before += _normalising(graph, scale, shift)
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    count = batch.dim_param or batch.dim_value
    given.CopyFrom(
        helper.make_tensor_value_info(_DEVICE, TensorProto.UINT8, [count, spec.size, spec.size, 3])
    )


def _foldable(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Tell whether a node is a convolution with constant weights and no padding."""
    settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    padded = any(settings.get("pads", ())) or settings.get("auto_pad", b"NOTSET") != b"NOTSET"
    constants = {item.name for item in graph.initializer}
    return (
        node.op_type == "Conv"
        and not padded
        and settings.get("group", 1) == 1
        and set(node.input[1:]) <= constants
    )


def _fold(
    graph: onnx.GraphProto,
    conv: onnx.NodeProto,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
) -> None:
    """Fold scale and shift into a convolution's weights [out, 3, rows, columns] and bias [out]."""
    by_name = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = by_name[conv.input[1]].astype(np.float64)
    bias = by_name[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weights))
    per_channel = (slice(None), None, None)
    moved = bias + (weights * shift[per_channel]).sum(axis=(1, 2, 3))
    folded = {
        f"{conv.name}_folded_weight": weights * scale[per_channel],
        f"{conv.name}_folded_bias": moved,
    }
    old = set(conv.input[1:])
    conv.input[:] = [_CHANNELS_FIRST, *folded]
    still_read = {name for node in graph.node for name in node.input}
    for item in list(graph.initializer):
        if item.name in old - still_read:
            graph.initializer.remove(item)
    graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in folded.items()
    )


def _normalising(
    graph: onnx.GraphProto, scale: NDArray[np.float32], shift: NDArray[np.float32]
) -> list[onnx.NodeProto]:
    names = (f"{_DEVICE}_scale", f"{_DEVICE}_shift")
    graph.initializer.extend(
        numpy_helper.from_array(value.reshape(1, 3, 1, 1), name)
        for value, name in zip((scale, shift), names, strict=True)
    )
    scaled = f"{_DEVICE}_scaled"
    return [
        helper.make_node("Mul", [_CHANNELS_FIRST, names[0]], [scaled], "pixels_scale"),
        helper.make_node("Add", [scaled, names[1]], [_INTERCHANGE], "pixels_shift"),
    ]


def add_label_head(path: Path, labels: LabelSet, logit_scale: float) -> None:
    """Add a zero-shot classification head to an image tower: the best label and its score.

    The outputs are `label_index` int64 [N] and `label_score` float32 [N], for devices whose
    program needs a label rather than an embedding. The head comes last in the graph and stays in
    fp32: logits are the cosines times the logit scale, and the score is the softmax probability
    of the best label (Radford et al. 2021, section 3.1).

    Args:
        path: the image tower's graph, which is rewritten.
        labels: the labels; `label_index` counts in their order.
        logit_scale: factor of the cosines.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    model = load_graph(path)
    graph = model.graph
    weights = (logit_scale * labels.embeddings.T).astype(np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.ascontiguousarray(weights), "label_weights"),
            numpy_helper.from_array(np.array([1]), "label_axis"),
        ]
    )
    index, score = LABEL_OUTPUTS
    embeds, logits, shares = OUTPUT_NAMES["image"], "label_logits", "label_shares"
    graph.node.extend(
        [
            helper.make_node("MatMul", [embeds, "label_weights"], [logits], logits),
            helper.make_node("ArgMax", [logits], [index], index, axis=1, keepdims=0),
            helper.make_node("Softmax", [logits], [shares], shares, axis=1),
            helper.make_node("ReduceMax", [shares, "label_axis"], [score], score, keepdims=0),
        ]
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0]
    count = [batch.dim_param or batch.dim_value]
    graph.output.extend(
        [
            helper.make_tensor_value_info(index, TensorProto.INT64, count),
            helper.make_tensor_value_info(score, TensorProto.FLOAT, count),
        ]
    )
    save_graph(model, path)
