"""Fine-tune a student with quantization-aware training where int8 misses its gates."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    tower_parts,
)
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds, GateOutcome, describe_missed
from edgeclip.export.gates.judge_precisions import (
    TowerEmbeddings,
    embed_test_pairs,
    gate_inputs,
    judge_precisions,
)
from edgeclip.export.gates.zero_shot import ZeroShotSet
from edgeclip.export.graph.calibration import CalibrationData, calibration_data
from edgeclip.export.graph.embedders import TowerGraph, runner_of
from edgeclip.export.graph.graph_io import PRODUCTS, load_graph, save_graph
from edgeclip.export.graph.graph_values import GraphEdit, attribute
from edgeclip.export.graph.to_onnx import STANDARD, GraphForm, export_tower
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.fp16 import stored_in_half
from edgeclip.export.quantizing.quantization_file import apply_passes
from edgeclip.export.quantizing.smooth import factors
from edgeclip.export.quantizing.write_config import write_config
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Precision, Tower


@dataclass(slots=True, eq=False)
class _Norm:
    """A LayerNorm, the largest values that it gave for each channel, and what read them."""

    name: str
    sizes: Tensor | None = None
    readers: dict[str, nn.Linear] = field(default_factory=dict)
    given: Tensor | None = None  # by the pass in hand

    def gave(self, _module: nn.Module, _inputs: Any, result: Tensor) -> None:
        largest = result.detach().abs().flatten(0, -2).amax(dim=0)
        self.sizes = largest if self.sizes is None else torch.maximum(self.sizes, largest)
        self.given = result

    def was_read(self, name: str, module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0] is self.given:
            self.readers[name] = module


def smooth_student(
    student: DualEncoder, tower: Tower, alphas: Mapping[str, float], data: CalibrationData
) -> None:
    """Divide the channels of some norms, and multiply the layers behind them, in place.

    Args:
        student: what it computes stays the same, but for rounding.
        tower: which one is smoothed.
        alphas: names of `nn.LayerNorm` in it, and for each the share that the weights take.
            Only linear layers may read its result.
        data: shows how large the channels become; pictures normalised, as float32.

    Raises:
        ExportError: a norm that no linear layer reads.
    """
    student.eval()
    norms = {name: _Norm(name) for name in alphas}
    embed = student.embed_image if tower == "image" else student.embed_text
    with _watched(student, norms), torch.inference_mode():
        for index in range(data.count):
            embed(torch.from_numpy(data.batch(index)).to(student.device))
    for name, alpha in alphas.items():
        _fold(student.get_submodule(name), norms[name], alpha)


@contextmanager
def _watched(student: DualEncoder, norms: Mapping[str, _Norm]) -> Iterator[None]:
    handles = []
    for norm in norms.values():
        handles.append(student.get_submodule(norm.name).register_forward_hook(norm.gave))
        handles += [
            module.register_forward_pre_hook(partial(norm.was_read, name))
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms.values():
            norm.given = None


def _fold(module: nn.Module, norm: _Norm, alpha: float) -> None:
    if norm.sizes is None or not norm.readers:
        raise ExportError(f"no linear layer reads {norm.name}, so it cannot be smoothed")
    weights = [
        layer.weight.detach().cpu().numpy().T.astype(np.float64) for layer in norm.readers.values()
    ]
    found = factors(norm.sizes.cpu().numpy().astype(np.float64), weights, alpha)
    divisors = torch.from_numpy(found).to(norm.sizes)
    with torch.no_grad():
        for values in module.parameters():
            values.div_(divisors)
        for layer in norm.readers.values():
            layer.weight.mul_(divisors)


Layers = dict[str, nn.Module]


def product_grids(
    student: DualEncoder, tower: Tower, source: Path, quantized: Path, config: StaticInt8
) -> ProductGrids:
    """Return how each layer of a tower is rounded, by its name in `student`.

    Ranges are read from the quantized graph, so they are what calibration found, whatever its
    method; layers that stay in float are left out.

    Args:
        student: the model that `source` was exported from.
        tower: which one.
        source: its graph in fp32.
        quantized: what was made of it, without smoothing and the like: the weights are those
            of the student.
        config: says how weights are rounded.

    Raises:
        ExportError: a product of the graph is none of the student's layers, or none is
            quantized.
    """
    layers = _layers(student, tower, nn.Linear, nn.Conv2d)
    weight = WeightGrid(largest=64 if config.reduce_range else 127, per_channel=config.per_channel)
    made = GraphEdit(load_graph(quantized))
    edit = GraphEdit(load_graph(source))
    float_nodes = {node.name: node for node in edit.graph.node}
    found: dict[str, ProductGrid] = {}
    for node in made.graph.node:
        grid = _input_grid(made, node)
        if grid is None or node.name not in float_nodes:
            continue
        for name in list(_layers_of(edit, float_nodes[node.name], layers)):
            found[name] = ProductGrid(input=grid, weight=weight)
            layers[name] = layers.pop(name)  # to the end: a layer with the same weights is next
    if not found:
        raise ExportError(f"{quantized.name} has no quantized product of the {tower} tower")
    return found


def norm_names(
    student: DualEncoder, tower: Tower, source: Path, nodes: Sequence[str]
) -> dict[str, str]:
    """Return the names of the student's norms that LayerNormalization nodes come from.

    Raises:
        ExportError: a node is none of them.
    """
    edit = GraphEdit(load_graph(source))
    norms = _layers(student, tower, nn.LayerNorm)
    return {name: _norm_of(edit, name, norms) for name in nodes}


def _layers(student: DualEncoder, tower: Tower, *kinds: type[nn.Module]) -> Layers:
    parts = tower_parts(tower)
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, kinds) and name.startswith(parts)
    }


def _input_grid(edit: GraphEdit, node: onnx.NodeProto) -> InputGrid | None:
    """How a product's input is quantized; None if it is not, or the node is no product."""
    if node.op_type not in PRODUCTS:
        return None
    given, weight = (edit.maker(name) for name in node.input[:2])
    if given is None or weight is None:
        return None
    if {given.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    scale, zero = (edit.needed(given, place) for place in (1, 2))
    limits = np.iinfo(zero.dtype)
    return InputGrid(
        scale=float(scale.item()),
        zero=int(zero.item()),
        lowest=int(limits.min),
        highest=int(limits.max),
    )


def _layers_of(edit: GraphEdit, node: onnx.NodeProto, layers: Layers) -> Iterator[str]:
    """Yield the names of the layers whose weights stand in a product's, one after another."""
    weight = _by_output(edit, node)
    start = 0
    while start < len(weight):
        name = next((item for item in layers if _begins(weight[start:], layers[item])), None)
        if name is None:
            raise ExportError(
                f"{node.name} is no layer of the student, so what quantizing does to it cannot "
                "be imitated: export the student again"
            )
        yield name
        start += len(_values(layers[name].weight))


def _by_output(edit: GraphEdit, node: onnx.NodeProto) -> NDArray[Any]:
    """Return a product's weight as torch has it: [outputs, inputs], or that of a Conv."""
    weight = edit.needed(node, 1)
    as_torch = node.op_type == "Conv" or attribute(node, "transB", 0)
    return weight if as_torch else weight.T


def _begins(weight: NDArray[Any], layer: nn.Module) -> bool:
    own = _values(layer.weight)
    return own.shape[1:] == weight.shape[1:] and np.array_equal(own, weight[: len(own)])


def _norm_of(edit: GraphEdit, name: str, norms: Layers) -> str:
    """Norms that were never trained are all alike: then the name of the scale tells."""
    node = edit.node(name)
    if node is not None and node.op_type == "LayerNormalization":
        same = [item for item, norm in norms.items() if _is_norm(edit, node, norm)]
        scale = node.input[1].removesuffix(".weight")
        found = [item for item in same if scale.endswith(item.removeprefix("model."))] or same
        if len(found) == 1:
            return found[0]
    raise ExportError(f"{name} is no LayerNorm of the student, so it cannot be smoothed there")


def _is_norm(edit: GraphEdit, node: onnx.NodeProto, norm: nn.Module) -> bool:
    parts = [item for item in (norm.weight, norm.bias) if item is not None]
    stored = [edit.constant(node, place) for place in range(1, len(node.input))]
    return len(parts) == len(stored) and all(
        one is not None and np.array_equal(one, _values(part))
        for one, part in zip(stored, parts, strict=True)
    )


def _values(weight: Any) -> NDArray[Any]:
    assert isinstance(weight, torch.Tensor)
    values: NDArray[Any] = weight.detach().cpu().numpy()
    return values


HINT = "--qat-steps 300 would fine-tune the student for int8 and try again"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Task:
    """What was quantized, and what decides whether it is good.

    Attributes:
        student: the model; it is put into evaluation mode, and its weights stay.
        configs: of the towers in static int8; no other can be fine-tuned.
        calibration: pairs with captions that ranges are found on.
        test: pairs with captions that the gates are measured on.
        device: that int8 is for.
        bounds: of the gates of int8.
        form: how the towers are captured.
        passes: names of the rewrites that the fp32 graph of a tower has, in order.
        zero_shot: labelled pictures, if there are any.
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

    @property
    def runner(self) -> DeviceProfile:
        """What runs graphs while they are judged: the device, if it is a CPU."""
        return runner_of(self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuning:
    """A fine-tune that the user allows.

    Attributes:
        source: pictures with captions to train on; best those that the student was trained on.
        settings: how long and how fast; see `gentle_settings`.
        folder: for embeddings, checkpoints, log, and in the end the student in `student`. A run
            that was stopped goes on from there.
    """

    source: Source
    settings: TrainSettings
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of it.

    Attributes:
        judged: the gates of int8 as it is now.
        tuned: towers whose fine-tuned int8 is what is there now.
        note: for a bundle's provenance; empty unless `tuned`.
        says: for a person; empty where nothing had to be mended.
    """

    judged: tuple[GateOutcome, ...]
    tuned: tuple[Tower, ...] = ()
    note: str = ""
    says: str = ""

    @property
    def passed(self) -> bool:
        """Whether all gates hold."""
        return not describe_missed(self.judged)


def tune_int8(
    task: Int8Task,
    graphs: Sequence[TowerGraph],
    embeddings: TowerEmbeddings,
    tuning: Tuning,
    progress: Progress = lambda line: None,
) -> Outcome:
    """Fine-tune the towers whose int8 misses a gate, and quantize them again; others stay.

    Where that is better, it takes the place of the int8 files in `graphs`; no other is touched.
    Nothing is done, and no training data is read, if all gates hold.

    Args:
        task: what was quantized, and what decides.
        graphs: both towers in fp32, and what was made of them; other precisions do not matter.
        embeddings: of the test pairs, by each graph.
        tuning: the fine-tune that is allowed.
        progress: called with a line for a person before each step.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    before = _Attempt(
        graphs={_place(graph): graph for graph in graphs if _matters(graph.precision)},
        embeddings={place: item for place, item in embeddings.items() if _matters(place[1])},
    )
    judged = before.judge(task)
    misses = "; ".join(describe_missed(judged))
    if not misses:
        return Outcome(judged=judged)
    towers = missed_towers(judged, task.configs)
    if not towers:
        return Outcome(judged=judged, says=f"{misses}. Only static int8 can be fine-tuned")
    progress(f"fine-tuning for int8, because {misses}")
    tuning.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="graphs-", dir=tuning.folder) as folder:
        after = _tune(task, before, towers, tuning, Path(folder), progress)
        found = after.judge(task)
        if not better(found, judged):
            says = f"{misses}. Fine-tuning for int8 made it no better, so it is left as it was"
            return Outcome(judged=judged, says=says)
        for tower in towers:
            made, place = (item.graphs[tower, "int8"].path for item in (after, before))
            save_graph(load_graph(made), place)
    note = (
        f"int8 fine-tuned for {tuning.settings.steps} steps of {tuning.settings.batch_size} on "
        f"{tuning.source.name}, because without that {misses}"
    )
    says = "; ".join(["fine-tuned for int8", *describe_missed(found)])
    return Outcome(judged=found, tuned=towers, note=note, says=says)


def missed_towers(judged: Iterable[GateOutcome], quantized: Iterable[Tower]) -> tuple[Tower, ...]:
    """Return which of the quantized towers miss a gate; if none does alone, all of them."""
    subjects = {item.subject for item in judged if not item.record.passed}
    if subjects == {"bundle"}:
        return tuple(quantized)
    return tuple(tower for tower in quantized if f"{tower} int8" in subjects)


def better(found: Iterable[GateOutcome], than: Iterable[GateOutcome]) -> bool:
    """Tell whether fewer gates are missed, or as many and the worst of them by less."""
    return _badness(found) < _badness(than)


def plainly(config: StaticInt8) -> StaticInt8:
    """Return a config without what would move weights or biases off those that were trained."""
    return replace(config, smoothing=(), equalised=False, bias_corrected=False)


def _badness(judged: Iterable[GateOutcome]) -> tuple[int, float]:
    records = [item.record for item in judged if not item.record.passed]
    return len(records), max(map(_excess, records), default=0.0)


def _excess(record: GateRecord) -> float:
    """What is lost, as a share of what may be: 1 - cos over 1 - bound, or points over points."""
    if record.direction == "<=":
        return record.value / record.bound if record.bound > 0 else float("inf")
    return (1 - record.value) / (1 - record.bound) if record.bound < 1 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attempt:
    """The task's student in fp32, and towers in int8; with embeddings of the test pairs."""

    graphs: Mapping[tuple[Tower, Precision], TowerGraph]
    embeddings: TowerEmbeddings

    def judge(self, task: Int8Task) -> tuple[GateOutcome, ...]:
        """Hold int8 against fp32."""
        graphs = [*self.graphs.values()]
        with stored_in_half(graphs, task.device) as shown:
            on = gate_inputs(
                task.student, shown, task.test, task.zero_shot, self.embeddings, task.runner
            )
        return judge_precisions(self.embeddings, {"int8": task.bounds}, on).judged


def _tune(
    task: Int8Task,
    before: _Attempt,
    towers: Sequence[Tower],
    tuning: Tuning,
    folder: Path,
    progress: Progress,
) -> _Attempt:
    """Fine-tune some towers of a copy of the student, and quantize them again."""
    student = _copy(task.student)
    grids: dict[str, ProductGrid] = {}
    for tower in towers:
        source, rounded = _start(task, before, student, tower, folder / "start")
        config = plainly(task.configs[tower])
        grids |= product_grids(student, tower, source.path, rounded.path, config)
    progress(f"embedding {tuning.source.name} with the student as it is")
    fine_tune(
        student,
        build_cache(task.student, tuning.source, tuning.folder / "cache"),
        tuning.source,
        grids=grids,
        settings=tuning.settings,
        out=tuning.folder / "run",
    )
    student.save(tuning.folder / "student")
    progress("quantizing and judging the fine-tuned student")
    made = [_quantized(task, _float(task, student, tower, folder), folder) for tower in towers]
    with stored_in_half(made, task.device) as shown:
        found = embed_test_pairs(student, shown, task.test, task.runner)
    return _Attempt(
        graphs={**before.graphs, **{_place(graph): graph for graph in made}},
        embeddings={**before.embeddings, **found},
    )


def _start(
    task: Int8Task, before: _Attempt, student: DualEncoder, tower: Tower, folder: Path
) -> tuple[TowerGraph, TowerGraph]:
    """Return the graphs, in fp32 and int8, of the student as its fine-tune begins.

    It is smoothed, in place, where its config smooths the graph.
    """
    config, source = task.configs[tower], before.graphs[tower, "fp32"]
    if config == plainly(config):
        return source, before.graphs[tower, "int8"]
    if config.smoothing:
        _smooth(task, student, source)
        source = _float(task, student, tower, folder)
    return source, _quantized(task, source, folder)


def _smooth(task: Int8Task, student: DualEncoder, graph: TowerGraph) -> None:
    """Smooth the student itself, as its config smooths a graph."""
    alphas = dict(task.configs[graph.tower].smoothing)
    names = norm_names(student, graph.tower, graph.path, tuple(alphas))
    by_norm: dict[str, float] = {}
    for node, name in names.items():  # the last layer's norm may be two nodes
        by_norm[name] = max(alphas[node], by_norm.get(name, 0.0))
    pixels = None if graph.tower == "text" else STANDARD.pixels
    data = calibration_data(task.student, task.calibration, pixels, batch=task.form.batch)
    smooth_student(student, graph.tower, by_norm, data)


def _float(task: Int8Task, student: DualEncoder, tower: Tower, folder: Path) -> TowerGraph:
    pixels = task.form.pixels if tower == "image" else None
    path = folder / tower_path(tower, "fp32", pixels)
    export_tower(student, tower, path, task.form)
    apply_passes(path, task.passes.get(tower, ()))
    return TowerGraph(tower, "fp32", path, pixels)


def _quantized(task: Int8Task, graph: TowerGraph, folder: Path) -> TowerGraph:
    """Quantize the graph of a student that is smoothed already."""
    target = folder / tower_path(graph.tower, "int8", graph.pixels)
    config = plainly(task.configs[graph.tower])
    data = calibration_data(task.student, task.calibration, graph.pixels, batch=task.form.batch)
    write_config(graph.path, target, config, data)
    return replace(graph, precision="int8", path=target)


def _copy(student: DualEncoder) -> DualEncoder:
    """Return a copy to train, whose embeddings stay in the student's space."""
    model = copy.deepcopy(student.model)
    return DualEncoder(model, student.image_spec, student.tokenizer, space=student.space).eval()


def _place(graph: TowerGraph) -> tuple[Tower, Precision]:
    return graph.tower, graph.precision


def _matters(precision: Precision) -> bool:
    return precision in ("fp32", "int8")
