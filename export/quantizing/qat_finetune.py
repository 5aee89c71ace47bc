"""Quantization-aware fine-tune of a student whose int8 misses its gates."""

import copy
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.quantization_aware import (
    InputGrid,
    ProductGrid,
    ProductGrids,
    WeightGrid,
    fine_tune,
)
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds, GateOutcome, describe_missed, is_missed
from edgeclip.export.gates.judge_precisions import (
    TowerEmbeddings,
    embed_test_pairs,
    gate_inputs,
    judge_precisions,
)
from edgeclip.export.gates.zero_shot import ZeroShotSet
from edgeclip.export.graph.calibration import CalibrationData, calibration_data
from edgeclip.export.graph.embedders import TowerGraph, judging_device
from edgeclip.export.graph.graph_io import PRODUCTS, load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphEdit, attribute
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM, GraphForm, export_tower
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import emulated_fp16
from edgeclip.export.quantizing.quantization_file import apply_passes
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.smoothquant import smoothing_divisors
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters

_log = logging.getLogger(__name__)

QAT_HINT = "--qat-steps 300 would fine-tune the student for int8 and try again"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QatTask:
    """A student with its int8 configs, and what its int8 is judged on.

    Attributes:
        student: the model; it is put into evaluation mode, and its weights stay.
        configs: configs of the towers in static int8; no other kind can be fine-tuned.
        calibration: pairs with captions that ranges are found on.
        test: pairs with captions that the gates are measured on.
        device: the device that int8 is for.
        bounds: bounds of the int8 gates.
        form: how the towers are exported.
        passes: names of the rewrites that the fp32 graph of a tower has, in order.
        zero_shot: labelled pictures, if there are any.
        accept_undecided: see `is_missed`.
        looks: see `judge_gates`.
        clusters: see `GateInputs`.
    """

    student: DualEncoder
    configs: Mapping[Tower, StaticInt8]
    calibration: Source
    test: Source
    device: DeviceProfile
    bounds: Bounds
    form: GraphForm
    passes: Mapping[Tower, Sequence[str]] = field(default_factory=dict)
    zero_shot: ZeroShotSet | None = None
    accept_undecided: bool = False
    looks: int = 1
    clusters: Clusters | None = None

    @property
    def judging_device(self) -> DeviceProfile:
        """The device profile that runs graphs while they are judged."""
        return judging_device(self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QatOptions:
    """Options of a quantization-aware fine-tune.

    Attributes:
        source: pictures with captions to train on; best those that the student was trained on.
        settings: steps and learning rate; see `finetune_settings`.
        folder: holds embeddings, checkpoints and the log; at the end the student, in `student`.
            A run that was stopped continues there.
        max_bad: how many pictures may be unreadable.
    """

    source: Source
    settings: TrainSettings
    folder: Path
    max_bad: MaxBad = DEFAULT_MAX_BAD


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QatResult:
    """The gates of int8 after a fine-tune, and which towers were replaced.

    Attributes:
        judged: the gates of int8 as it is now.
        tuned: towers whose int8 files are now the fine-tuned ones.
        note: text for a bundle's provenance; empty unless `tuned`.
        message: text for the user; empty if all gates held from the beginning.
    """

    judged: tuple[GateOutcome, ...]
    tuned: tuple[Tower, ...] = ()
    note: str = ""
    message: str = ""


def finetune_int8(
    task: QatTask,
    graphs: Sequence[TowerGraph],
    embeddings: TowerEmbeddings,
    options: QatOptions,
) -> QatResult:
    """Fine-tune the towers whose int8 misses a gate, and quantize them again.

    The result replaces the int8 files in `graphs` if it is better; no other file is touched.
    Nothing is done, and no training data is read, if all gates hold.

    Args:
        task: the student, its configs and its test data.
        graphs: both towers in fp32 and int8; other precisions are ignored.
        embeddings: embeddings of the test pairs, by each graph.
        options: options of the fine-tune.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call continues from the last checkpoint.
    """
    before = _Towers(
        graphs={
            (graph.tower, graph.precision): graph
            for graph in graphs
            if graph.precision in ("fp32", "int8")
        },
        embeddings={at: item for at, item in embeddings.items() if at[1] in ("fp32", "int8")},
    )
    judged = before.judge(task)
    missed = [
        item for item in judged if is_missed(item.record, accept_undecided=task.accept_undecided)
    ]
    if not missed:
        return QatResult(judged=judged)
    misses = "; ".join(describe_missed(missed))
    towers = failing_towers(missed, task.configs)
    if not towers:
        message = f"{misses}. Only static int8 can be fine-tuned"
        return QatResult(judged=judged, message=message)
    _log.info("fine-tuning for int8, because %s ...", misses)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="graphs-", dir=options.folder) as folder:
        after = _tune(task, before, towers, options, Path(folder))
        found = after.judge(task)
        if not is_better(found, judged):
            message = f"{misses}. Fine-tuning for int8 made it no better, so it is left as it was"
            return QatResult(judged=judged, message=message)
        for tower in towers:
            made, target = (item.graphs[tower, "int8"].path for item in (after, before))
            save_graph(load_graph(made), target)
    note = (
        f"int8 fine-tuned for {options.settings.steps} steps of {options.settings.batch_size} on "
        f"{options.source.name}, because without that {misses}"
    )
    left = describe_missed(found, accept_undecided=task.accept_undecided)
    message = "; ".join(["fine-tuned for int8", *left])
    return QatResult(judged=found, tuned=towers, note=note, message=message)


def failing_towers(missed: Iterable[GateOutcome], quantized: Iterable[Tower]) -> tuple[Tower, ...]:
    """Return the quantized towers of missed gates; all of them if only the bundle missed one."""
    subjects = {item.subject for item in missed}
    if subjects == {"bundle"}:
        return tuple(quantized)
    return tuple(tower for tower in quantized if f"{tower} int8" in subjects)


def is_better(outcomes: Iterable[GateOutcome], baseline: Iterable[GateOutcome]) -> bool:
    """Return whether `outcomes` miss fewer gates, or as many but the worst of them by less."""
    return _misses(outcomes) < _misses(baseline)


def _misses(judged: Iterable[GateOutcome]) -> tuple[int, float]:
    """Return how many gates are missed, and the worst loss as a share of the allowed loss."""
    records = [item.record for item in judged if not item.record.passed]
    return len(records), max(map(_loss_share, records), default=0.0)


def _loss_share(record: GateRecord) -> float:
    """Return (1 - cosine) / (1 - bound), or points lost / points allowed."""
    if record.direction == "<=":
        return record.value / record.bound if record.bound > 0 else float("inf")
    return (1 - record.value) / (1 - record.bound) if record.bound < 1 else float("inf")


def without_smoothing(config: StaticInt8) -> StaticInt8:
    """Return a config that leaves the trained weights where they are."""
    return replace(config, smoothing=())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Towers:
    """Towers in fp32 and int8, with their embeddings of the test pairs."""

    graphs: Mapping[tuple[Tower, Precision], TowerGraph]
    embeddings: TowerEmbeddings

    def judge(self, task: QatTask) -> tuple[GateOutcome, ...]:
        """Judge int8 against fp32."""
        with emulated_fp16([*self.graphs.values()], task.device) as runnable:
            inputs = gate_inputs(
                task.student,
                runnable,
                task.test,
                task.zero_shot,
                self.embeddings,
                task.judging_device,
                task.clusters,
            )
        return judge_precisions(
            self.embeddings,
            {"int8": task.bounds},
            inputs,
            accept_undecided=task.accept_undecided,
            looks=task.looks,
        ).judged


def _tune(
    task: QatTask,
    before: _Towers,
    towers: Sequence[Tower],
    options: QatOptions,
    folder: Path,
) -> _Towers:
    """Fine-tune some towers of a copy of the student, and quantize them again."""
    student = DualEncoder(
        copy.deepcopy(task.student.model),
        task.student.image_spec,
        task.student.tokenizer,
        space=task.student.space,
        licence=task.student.licence,
    ).eval()
    grids: dict[str, ProductGrid] = {}
    for tower in towers:
        source, int8 = _starting_graphs(task, before, student, tower, folder / "start")
        config = without_smoothing(task.configs[tower])
        grids |= product_grids(student, tower, source.path, int8.path, config)
    _log.info("embedding %s with the student as it is ...", options.source.name)
    folder_of_cache = options.folder / "cache"
    cache = build_cache(task.student, options.source, folder_of_cache, max_bad=options.max_bad)
    fine_tune(
        student,
        cache,
        options.source,
        grids=grids,
        settings=options.settings,
        out=options.folder / "run",
    )
    student.save(options.folder / "student")
    _log.info("quantizing and judging the fine-tuned student ...")
    graphs = [_quantize(task, _export(task, student, tower, folder), folder) for tower in towers]
    with emulated_fp16(graphs, task.device) as runnable:
        embeddings = embed_test_pairs(student, runnable, task.test, task.judging_device)
    return _Towers(
        graphs={**before.graphs, **{(graph.tower, graph.precision): graph for graph in graphs}},
        embeddings={**before.embeddings, **embeddings},
    )


def _starting_graphs(
    task: QatTask, before: _Towers, student: DualEncoder, tower: Tower, folder: Path
) -> tuple[TowerGraph, TowerGraph]:
    """Return a tower in fp32 and int8 as its fine-tune begins.

    The student is smoothed in place where its config smooths the graph.
    """
    alphas, source = dict(task.configs[tower].smoothing), before.graphs[tower, "fp32"]
    if not alphas:
        return source, before.graphs[tower, "int8"]
    by_norm: dict[str, float] = {}
    for node, name in layer_norm_names(student, tower, source.path, tuple(alphas)).items():
        by_norm[name] = max(alphas[node], by_norm.get(name, 0.0))  # one norm may be two nodes
    pixels = None if tower == "text" else INTERCHANGE_FORM.pixels
    data = calibration_data(task.student, task.calibration, pixels, batch=task.form.batch)
    smooth_student(student, tower, by_norm, data)
    source = _export(task, student, tower, folder)
    return source, _quantize(task, source, folder)


def _export(task: QatTask, student: DualEncoder, tower: Tower, folder: Path) -> TowerGraph:
    pixels = task.form.pixels if tower == "image" else None
    path = folder / tower_path(tower, "fp32", pixels)
    export_tower(student, tower, path, task.form)
    apply_passes(path, task.passes.get(tower, ()))
    return TowerGraph(tower, "fp32", path, pixels)


def _quantize(task: QatTask, graph: TowerGraph, folder: Path) -> TowerGraph:
    """Quantize the graph of a student that is already smoothed."""
    target = folder / tower_path(graph.tower, "int8", graph.pixels)
    config = without_smoothing(task.configs[graph.tower])
    data = calibration_data(task.student, task.calibration, graph.pixels, batch=task.form.batch)
    quantize_graph(graph.path, target, config, data)
    return replace(graph, precision="int8", path=target)


def smooth_student(
    student: DualEncoder, tower: Tower, alphas: Mapping[str, float], data: CalibrationData
) -> None:
    """Apply SmoothQuant to a torch student in place: scale its norms and the layers behind them.

    Args:
        student: its embeddings stay the same, but for rounding.
        tower: which one is smoothed.
        alphas: by the name of an `nn.LayerNorm`, from 0 to 1: how much of the outliers the
            weights take. Only linear layers may read its result.
        data: shows how large the channels become; pictures normalised, as float32.

    Raises:
        ExportError: no linear layer reads one of the norms.
    """
    student.eval()
    norms = {name: _NormWatch(name) for name in alphas}
    embed = student.embed_image if tower == "image" else student.embed_text
    with _watch(student, norms), torch.inference_mode():
        for index in range(data.count):
            embed(torch.from_numpy(data.batch(index)).to(student.device))
    for name, alpha in alphas.items():
        _fold(student.get_submodule(name), norms[name], alpha)


@dataclass(slots=True, eq=False)
class _NormWatch:
    """Hooks of a LayerNorm: the largest value of each channel, and the layers that read it."""

    name: str
    largest: Tensor | None = None
    readers: dict[str, nn.Linear] = field(default_factory=dict)
    result: Tensor | None = None  # of the current forward pass

    def after_norm(self, _module: nn.Module, _inputs: Any, result: Tensor) -> None:
        largest = result.detach().abs().flatten(0, -2).amax(dim=0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.result = result

    def before_linear(self, name: str, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0] is self.result:
            self.readers[name] = module


@contextmanager
def _watch(student: DualEncoder, norms: Mapping[str, _NormWatch]) -> Iterator[None]:
    handles = []
    for norm in norms.values():
        handles.append(student.get_submodule(norm.name).register_forward_hook(norm.after_norm))
        handles += [
            module.register_forward_pre_hook(partial(norm.before_linear, name))
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms.values():
            norm.result = None


def _fold(module: nn.Module, norm: _NormWatch, alpha: float) -> None:
    if norm.largest is None or not norm.readers:
        raise ExportError(f"no linear layer reads {norm.name}, so it cannot be smoothed")
    weights = [
        layer.weight.detach().cpu().numpy().T.astype(np.float64) for layer in norm.readers.values()
    ]
    largest = norm.largest.cpu().numpy().astype(np.float64)
    divisors = torch.from_numpy(smoothing_divisors(largest, weights, alpha)).to(norm.largest)
    with torch.no_grad():
        for values in module.parameters():
            values.div_(divisors)
        for layer in norm.readers.values():
            layer.weight.mul_(divisors)


_Layers = dict[str, nn.Module]


def product_grids(
    student: DualEncoder, tower: Tower, source: Path, quantized: Path, config: StaticInt8
) -> ProductGrids:
    """Return how each layer of a tower is rounded in its int8 graph, by its name in `student`.

    Activation ranges are read from the quantized graph. Layers that stay in float are left out, and
    so are keys and values of a SigLIP's pooling, which torch computes in one function.

    Args:
        student: the model that `source` was exported from.
        tower: which one.
        source: its graph in fp32.
        quantized: `source` in int8, without smoothing, so that its weights are the student's.
        config: how weights are rounded.

    Raises:
        ExportError: a product of the graph is none of the student's layers, or none is
            quantized.
    """
    layers = _layers_of_tower(student, tower, nn.Linear, nn.Conv2d)
    pools = _layers_of_tower(student, tower, nn.MultiheadAttention)
    weight = WeightGrid(largest=64 if config.reduce_range else 127, per_channel=config.per_channel)
    int8 = GraphEdit(load_graph(quantized))
    edit = GraphEdit(load_graph(source))
    float_nodes = {node.name: node for node in edit.graph.node}
    grids: dict[str, ProductGrid] = {}
    for node in int8.graph.node:
        grid = _input_grid(int8, node)
        if grid is None or node.name not in float_nodes:
            continue
        if _is_pooling(edit, float_nodes[node.name], pools):
            continue
        for name in list(_match_layers(edit, float_nodes[node.name], layers)):
            grids[name] = ProductGrid(input=grid, weight=weight)
            layers[name] = layers.pop(name)  # to the end: a layer with the same weights is next
    if not grids:
        raise ExportError(f"{quantized.name} has no quantized product of the {tower} tower")
    return grids


def layer_norm_names(
    student: DualEncoder, tower: Tower, source: Path, nodes: Sequence[str]
) -> dict[str, str]:
    """Return the names of the student's norms that LayerNormalization nodes were exported from.

    Raises:
        ExportError: a node is none of them.
    """
    edit = GraphEdit(load_graph(source))
    norms = _layers_of_tower(student, tower, nn.LayerNorm)
    return {name: _match_norm(edit, name, norms) for name in nodes}


def _layers_of_tower(student: DualEncoder, tower: Tower, *kinds: type[nn.Module]) -> _Layers:
    prefixes = student.tower_parts(tower)
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, kinds) and name.startswith(prefixes)
    }


def _input_grid(edit: GraphEdit, node: onnx.NodeProto) -> InputGrid | None:
    """Return how a product's input is quantized; None if it is not, or the node is no product."""
    if node.op_type not in PRODUCTS:
        return None
    value, weight = (edit.maker(name) for name in node.input[:2])
    if value is None or weight is None:
        return None
    if {value.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    scale, zero = (edit.needed(value, place) for place in (1, 2))
    limits = np.iinfo(zero.dtype)
    return InputGrid(
        scale=float(scale.item()),
        zero=int(zero.item()),
        lowest=int(limits.min),
        highest=int(limits.max),
    )


def _is_pooling(edit: GraphEdit, node: onnx.NodeProto, pools: _Layers) -> bool:
    """Tell whether a product computes keys, values or both of an `nn.MultiheadAttention`."""
    stored = edit.needed(node, 1)
    weight = stored if attribute(node, "transB", 0) else stored.T
    for pool in pools.values():
        _, key, value = np.split(_to_numpy(pool.in_proj_weight), 3)
        for part in (key, value, np.concatenate([key, value])):
            if weight.shape == part.shape and np.array_equal(weight, part):
                return True
    return False


def _match_layers(edit: GraphEdit, node: onnx.NodeProto, layers: _Layers) -> Iterator[str]:
    """Yield the names of the layers whose weights are concatenated in a product's weight."""
    stored = edit.needed(node, 1)  # as torch has it: [outputs, inputs], or that of a Conv
    weight = stored if node.op_type == "Conv" or attribute(node, "transB", 0) else stored.T
    start = 0
    while start < len(weight):
        rest = weight[start:]
        name = next((item for item in layers if _starts_with(rest, layers[item])), None)
        if name is None:
            raise ExportError(
                f"{node.name} is no layer of the student, so what quantizing does to it cannot "
                "be imitated: export the student again"
            )
        yield name
        start += len(_to_numpy(layers[name].weight))


def _starts_with(weight: NDArray[Any], layer: nn.Module) -> bool:
    own = _to_numpy(layer.weight)
    return own.shape[1:] == weight.shape[1:] and np.array_equal(own, weight[: len(own)])


def _match_norm(edit: GraphEdit, name: str, norms: _Layers) -> str:
    """Return the norm with a node's scale and bias; untrained norms are told apart by name."""
    node = edit.node(name)
    if node is not None and node.op_type == "LayerNormalization":
        same = [item for item, norm in norms.items() if _has_parameters(edit, node, norm)]
        scale = node.input[1].removesuffix(".weight")
        found = [item for item in same if scale.endswith(item.removeprefix("model."))] or same
        if len(found) == 1:
            return found[0]
    raise ExportError(f"{name} is no LayerNorm of the student, so it cannot be smoothed there")


def _has_parameters(edit: GraphEdit, node: onnx.NodeProto, norm: nn.Module) -> bool:
    own = [item for item in (norm.weight, norm.bias) if item is not None]
    stored = [edit.constant(node, place) for place in range(1, len(node.input))]
    return len(own) == len(stored) and all(
        one is not None and np.array_equal(one, _to_numpy(other))
        for one, other in zip(stored, own, strict=True)
    )


def _to_numpy(weight: Any) -> NDArray[Any]:
    assert isinstance(weight, torch.Tensor)
    values: NDArray[Any] = weight.detach().cpu().numpy()
    return values
