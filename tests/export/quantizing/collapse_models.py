"""Real towers brought to the three collapses that quantizing is known for, and the naive ways.

The text tower is that of the built-in bundle, trained and exported by this project. What is
planted into it is what large trained towers have by themselves: an activation of hundreds in
one channel of the first token (Sun et al. 2024, Massive Activations in Large Language Models,
arXiv:2402.17762), masks of the lowest fp32 number, and a token with an outsized embedding.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from edgeclip.export.gates.gates import Bounds, judge_tower
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.quantizing.activation_ranges import quiet
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.inputs.tokenizer import TextTokenizer

BUNDLE = Path(__file__).parents[3] / "export" / "emoji_bundle"
TEXT_TOWER = BUNDLE / "onnx" / "text_model.onnx"
_CONFIG = json.loads((BUNDLE / "config.json").read_text(encoding="utf-8"))
TEXT_LAYERS: int = _CONFIG["text_config"]["num_hidden_layers"]
TOKENS = "text_model.embeddings.token_embedding.weight"
POSITIONS = "text_model.embeddings.position_embedding.weight"
NAMES = (
    *("red apple", "owl", "eagle", "hot beverage", "police car", "moai", "rocket", "guitar"),
    *("snowman", "tulip", "dolphin", "umbrella", "pizza", "crown", "bicycle", "sunflower"),
)
SIZES, PLACES = ("", "small ", "large "), ("left of", "right of", "above", "below")
COLOURS = ("white", "black", "red", "green", "blue", "purple", "pink", "brown")
LOWEST = np.finfo(np.float32).min


def captions(seed: int, count: int) -> CalibrationData:
    """Token ids of captions as the tower was trained on, 25 to a batch."""
    draw = np.random.default_rng(seed)
    bundle = Bundle.open(BUNDLE)
    tokenizer = TextTokenizer.from_file(bundle.tokenizer_path, bundle.manifest.spec.text)
    texts = []
    for _ in range(count):
        first, second = draw.choice(NAMES, 2, replace=False)
        words = [draw.choice(SIZES) + first, draw.choice(PLACES), draw.choice(SIZES) + second]
        texts.append(f"{' '.join(words)} on a {draw.choice(COLOURS)} background")
    parts = [texts[start : start + 25] for start in range(0, count, 25)]
    return CalibrationData(len(parts), lambda index: tokenizer.encode(parts[index]))


def within(candidate: NDArray[np.float32], reference: NDArray[np.float32], bounds: Bounds) -> bool:
    """Whether a tower's embeddings pass all its gates."""
    return all(record.is_inside for record in judge_tower(candidate, reference, bounds))


def with_massive_activation(model: onnx.ModelProto, value: float = 400) -> None:
    """Let one channel of the begin-of-text token, which every text has, be this large."""
    table = _constant(model, TOKENS)
    table[0, 7] += value
    _replace(model, TOKENS, table)


def with_offset(model: onnx.ModelProto, value: float = 300) -> None:
    """Add a number to all channels of the residual stream, which every LayerNorm takes out."""
    _replace(model, POSITIONS, _constant(model, POSITIONS) + np.float32(value))


def with_outsized_token(model: onnx.ModelProto, token: int = 5, factor: float = 300) -> None:
    """Scale the embedding of a token that no caption here has."""
    table = _constant(model, TOKENS)
    table[token] *= factor
    _replace(model, TOKENS, table)


def with_lowest_mask(model: onnx.ModelProto) -> None:
    """Compute the causal mask as transformers does: (1 - visible) * the lowest number."""
    hidden = (_constant(model, "mask") < 0).astype(np.float32)
    graph = model.graph
    graph.initializer.remove(_find(model, "mask"))
    graph.initializer.append(numpy_helper.from_array(hidden, "hidden"))
    graph.initializer.append(numpy_helper.from_array(np.array(LOWEST), "lowest"))
    graph.node.insert(0, helper.make_node("Mul", ["hidden", "lowest"], ["mask"], "make_mask"))


def decompose_layer_norms(model: onnx.ModelProto) -> None:
    """Write LayerNormalization as means and powers, as exporters did before it was an operator."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for name, value in (("last_axis", np.array([-1])), ("two", np.array(2, np.float32))):
        graph.initializer.append(numpy_helper.from_array(value, name))
    for node in graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        (epsilon,) = (item.f for item in node.attribute if item.name == "epsilon")
        small = numpy_helper.from_array(np.array(epsilon, np.float32), f"{node.name}_epsilon")
        graph.initializer.append(small)
        nodes += _means_and_powers(node, small.name)
    del graph.node[:]
    graph.node.extend(nodes)


def naive_half(source: Path, target: Path, *, cut: bool = True) -> None:
    """Convert every node and weight to fp16.

    Weights beyond it are cut, or become infinite as torch's `half()` makes them.
    """
    weights = {i.name: numpy_helper.to_array(i) for i in load_graph(source).graph.initializer}
    half = convert_float_to_float16(
        load_graph(source), keep_io_types=True, disable_shape_infer=True
    )
    for item in half.graph.initializer:
        if item.data_type == TensorProto.FLOAT16 and not cut:
            with np.errstate(over="ignore"):
                rounded = weights[item.name].astype(np.float16)
            item.CopyFrom(numpy_helper.from_array(rounded, item.name))
    save_graph(half, target)


def naive_dynamic_int8(source: Path, target: Path) -> None:
    """Quantize all that onnxruntime quantizes by itself."""
    with quiet():
        quantize_dynamic(source, target)


def _means_and_powers(node: onnx.NodeProto, epsilon: str) -> list[onnx.NodeProto]:
    given, gain, bias = node.input
    stem, result = node.name, node.output[0]
    steps = (
        ("ReduceMean", [given, "last_axis"], "mean"),
        ("Sub", [given, "mean"], "centred"),
        ("Pow", ["centred", "two"], "squares"),
        ("ReduceMean", ["squares", "last_axis"], "variance"),
        ("Add", ["variance", epsilon], "shifted"),
        ("Sqrt", ["shifted"], "deviation"),
        ("Div", ["centred", "deviation"], "unit"),
        ("Mul", ["unit", gain], "scaled"),
        ("Add", ["scaled", bias], "result"),
    )
    made = {name: f"{stem}_{name}" for _, _, name in steps} | {"result": result}
    return [
        helper.make_node(
            kind, [made.get(name, name) for name in read], [made[name]], f"{stem}_{name}"
        )
        for kind, read, name in steps
    ]


def _find(model: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(item for item in model.graph.initializer if item.name == name)
    return found


def _constant(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    return numpy_helper.to_array(_find(model, name)).copy()


def _replace(model: onnx.ModelProto, name: str, values: NDArray[np.float32]) -> None:
    _find(model, name).CopyFrom(numpy_helper.from_array(values, name))
