"""Compare an exported fp32 tower with torch: judge parity, and name the first node that differs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds, data_record, judge_equality
from edgeclip.export.graph.embedders import (
    Embedder,
    TowerGraph,
    embed_all,
    graph_embedder,
    torch_embedder,
    tower_inputs,
)
from edgeclip.export.graph.export_modules import tower_module
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.graph_values import GraphValues, relative_error
from edgeclip.export.graph.to_onnx import GraphForm, capture
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.towers.tower_runner import tower_feed


class TorchValues:
    """The values that torch computes in a program exported by `torch.onnx.export`, from one run.

    The exporter names the results of ONNX nodes after those of torch's operators, so they
    can be compared by name. (torch.onnx.verification compares the same values, but only
    those of a program still in memory, and with one more session for every value.)

    Args:
        program: the exporter's result.
        inputs: the program's inputs, in order.
    """

    def __init__(self, program: torch.onnx.ONNXProgram, inputs: Sequence[Tensor]) -> None:
        captured = program.exported_program
        assert captured is not None
        recorder = _Recorder(captured.module())
        with torch.no_grad():
            given = recorder.run(*inputs)
        self.results: tuple[NDArray[Any], ...] = tuple(map(_array, _flat(given)))
        names = [str(item.name) for item in program.model.graph.outputs]
        self._values = recorder.values | dict(zip(names, self.results, strict=True))
        self.names: tuple[str, ...] = tuple(self._values)

    def values(self, names: Collection[str]) -> dict[str, NDArray[Any]]:
        """Return the values of those names."""
        return {name: self._values[name] for name in names}


class _Recorder(torch.fx.Interpreter):
    """Runs a program operator by operator and keeps each tensor."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)  # an exported module is a graph module
        self.values: dict[str, NDArray[Any]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            self.values[n.name] = _array(result)
        return result


def _flat(given: Any) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _array(value: Tensor) -> NDArray[Any]:
    """Copy a tensor; bfloat16, which numpy lacks, as float32."""
    plain = value.detach().cpu()
    found: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return found.copy()


_TOGETHER = 128  # pairs that are compared in batches
_ALONE = 4  # of these, how many run once more by themselves


def check_parity(
    dual: DualEncoder, tower: Tower, embed: Embedder, source: Source, bounds: Bounds
) -> tuple[GateRecord, ...]:
    """Judge a tower against torch on the source's first pairs.

    Inputs come from the runtime's own preprocessing and tokenizer. Some run once more at
    batch 1, texts then without padding, and must give what torch gave for the batch.

    Raises:
        ConfigError: pairs without captions.
        EngineError: the engine cannot run the tower.
    """
    together = tower_inputs(dual, tower, source, count=_TOGETHER)
    candidate, reference = embed_all(together, [embed, torch_embedder(dual, tower)])
    singles = tower_inputs(dual, tower, source, count=_ALONE, batch_size=1)
    (alone,) = embed_all(singles, [embed])
    return judge_equality(
        np.concatenate([candidate, alone]),
        np.concatenate([reference, reference[: len(alone)]]),
        bounds,
        data_record(source, min(len(source), _TOGETHER)),
    )


_TOLERANCE = 1e-3  # relative error of a value, beyond what rounding in fp32 does in a sound tower
_SEARCHED = 128  # pairs, as many as the gate uses
_WORST = 4  # the number of these that are compared value by value
_UNSEEN = (
    "no value differs on the worst inputs: the cause is in the engine's way of running batches"
)


def explain_parity(
    dual: DualEncoder, graph: TowerGraph, source: Source, device: DeviceProfile, form: GraphForm
) -> str:
    """Explain in one line where an fp32 graph starts to differ from torch, for an error message.

    The tower is captured once more, which takes as long as its export.

    Args:
        dual: the student.
        graph: its tower in fp32.
        source: the pairs of the gate; the worst of them are run.
        device: runs the graph.
        form: the form that the tower was exported in.

    Raises:
        EngineError: the engine cannot run the graph.
        ExportError: torch cannot capture the tower.
    """
    embed = graph_embedder(graph, dual.spec.image, device)
    reference = torch_embedder(dual, graph.tower)
    values = _worst_inputs(dual, graph.tower, source, (reference, embed), form.batch)
    module = tower_module(dual, graph.tower, patch_features=form.patch_features)
    standard = tower_feed(values, graph.tower, "float32-nchw", dual.spec.image)
    (given,) = (torch.from_numpy(item).to(dual.device) for item in standard.values())
    forward = dual.embed_image if graph.tower == "image" else dual.embed_text
    tolerance = _TOLERANCE
    in_torch = _differing_module(dual.model, (forward, module), given, tolerance)
    if in_torch is not None:
        return f"before any export, {type(module).__name__} differs from the student {in_torch}"
    captured = TorchValues(capture(dual, graph.tower, form), (given,))
    if relative_error(reference(values), captured.results[0]) > tolerance:
        return f"torch.export captured something else than {type(module).__name__} computes"
    feed = tower_feed(values, graph.tower, graph.pixels, dual.spec.image)
    on_engine = GraphValues(load_graph(graph.path), feed, partial(open_engine, device=device))
    return str(find_first_difference(captured, on_engine, tolerance) or _UNSEEN)


def _worst_inputs(
    dual: DualEncoder,
    tower: Tower,
    source: Source,
    embedders: tuple[Embedder, ...],
    batch: int | None,
) -> NDArray[Any]:
    """Return the inputs whose embeddings by the two embedders are furthest apart, of one batch."""
    most, found = -1.0, None
    inputs = tower_inputs(dual, tower, source, count=_SEARCHED)
    for values in inputs:
        right, other = (embed(values) for embed in embedders)
        apart = np.nan_to_num(np.linalg.norm(other - right, axis=1), nan=np.inf)
        if apart.max() > most:
            worst = np.argsort(-apart)[: batch or _WORST]
            most, found = float(apart.max()), values[np.resize(worst, batch or len(worst))]
    assert found is not None
    return found


def _differing_module(
    model: nn.Module,
    forwards: tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]],
    given: Tensor,
    tolerance: float,
) -> str | None:
    """Compare two forward passes over the same modules; name the first module that differs."""
    right, found = (_module_results(model, forward, given) for forward in forwards)
    if relative_error(right[""], found[""]) <= tolerance:
        return None
    for name, value in right.items():
        other = found.get(name)
        if other is None or other.shape != value.shape or not name:
            continue
        if relative_error(value, other) > tolerance:
            return f"from {name} ({type(model.get_submodule(name)).__name__}) on"
    return "behind its last module"


def _module_results(
    model: nn.Module, forward: Callable[[Tensor], Any], given: Tensor
) -> dict[str, NDArray[Any]]:
    """Return the result of each leaf module at its first call, in order; "" is the embedding."""
    results: dict[str, NDArray[Any]] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor) and name not in results:
                results[name] = result.float().cpu().numpy().copy()

        return record

    hooks = [
        part.register_forward_hook(recorder(name))
        for name, part in model.named_modules()
        if not any(part.children())
    ]
    try:
        with torch.no_grad():
            result = forward(given)
    finally:
        for hook in hooks:
            hook.remove()
    results[""] = (result if isinstance(result, Tensor) else result[0]).float().cpu().numpy()
    return results


_VALUES_AT_ONCE = 64  # values compared in one run: few enough for memory


class ReferenceValues(Protocol):
    """Source of reference values by name: another graph, or a torch program."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values it can give."""
        ...

    def values(self, names: Collection[str]) -> Mapping[str, NDArray[Any]]:
        """Return the values of some names."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDifference:
    """The first node whose result differs, while everything it depends on agrees.

    Attributes:
        node: name of the node in the candidate.
        op_type: its operator.
        value: the value that differs.
        behind: names of the nodes before it whose values the reference does not have, back to
            those that agree; one of these may be the cause.
        error: its relative error, see `relative_error`.
        tolerance: the largest relative error of a value that agrees.
        agreed: the last compared value that it depends on, None if it depends on inputs only.
        agreed_error: the relative error of `agreed`.
    """

    node: str
    op_type: str
    value: str
    behind: tuple[str, ...]
    error: float
    tolerance: float
    agreed: str | None
    agreed_error: float | None

    def __str__(self) -> str:
        agreed = "it depends on inputs only"
        if self.agreed is not None:
            agreed = f"the last value that agrees is {self.agreed} ({self.agreed_error:.2g})"
        behind = f" with {', '.join(self.behind)} before it" if self.behind else ""
        return (
            f"the first node that differs is {self.node} ({self.op_type}){behind}: {self.value} "
            f"has a relative error of {self.error:.2g} (tolerance {self.tolerance:g}), {agreed}"
        )


def find_first_difference(
    reference: ReferenceValues, candidate: GraphValues, tolerance: float
) -> GraphDifference | None:
    """Find the first node of `candidate` whose result is not that of `reference`.

    If an output differs, bisection finds a node where a difference begins, with a run of both
    graphs for each of about log2(values) steps. An earlier node may differ as well: a softmax or a
    residual sum can hide a fault that shows again later. So everything that the node depends on
    (or the whole graph, where the outputs agree) is then compared from its beginning, many values
    in each run.

    Args:
        reference: the right values.
        candidate: the graph in question, with its inputs.
        tolerance: the largest relative error of a value that agrees.

    Returns:
        None if all values agree.

    Raises:
        ExportError: no output has the same name in both.
        EngineError: an engine cannot run a graph.
    """
    search = _Search(reference, candidate, tolerance)
    found = search.bisect()
    found = search.earliest(found) or found
    return None if found is None else search.describe(found)


class _Search:
    """Compares values of the same name in both graphs, and remembers their errors."""

    def __init__(
        self, reference: ReferenceValues, candidate: GraphValues, tolerance: float
    ) -> None:
        self._reference, self._candidate = reference, candidate
        self._tolerance = tolerance
        self._shared = frozenset(reference.names) & frozenset(candidate.names)
        self._errors: dict[str, float] = {}
        if self._shared.isdisjoint(candidate.outputs):
            raise ExportError("the graphs share no output name, so they cannot be compared")

    def bisect(self) -> str | None:
        """Return a value that differs while what its node reads agrees; None if outputs agree."""
        outputs = [name for name in self._candidate.outputs if name in self._shared]
        found = next((name for name in outputs if self._differs(name)), None)
        while found is not None:
            path = [*self._before(found), found]
            low, high = -1, len(path) - 1  # path[low] agrees, path[high] differs
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._differs(path[middle]) else (middle, high)
            nearest, _ = self._candidate.nearest(path[high], self._shared)
            found = next((name for name in nearest if self._differs(name)), None)
            if found is None:
                return path[high]
        return None

    def earliest(self, last: str | None) -> str | None:
        """Return the first value before `last` that differs, also when it is computed alone."""
        names = self._before(last) if last else self._candidate.names
        names = [name for name in names if name in self._shared]
        for start in range(0, len(names), _VALUES_AT_ONCE):
            part = names[start : start + _VALUES_AT_ONCE]
            right, found = self._reference.values(part), self._candidate.values(part)
            for name in part:
                error = relative_error(right[name], found[name])
                if error > self._tolerance and self._differs(name):
                    return name
        return None

    def describe(self, name: str) -> GraphDifference:
        """Describe the node that computes a value that differs."""
        nearest, (*before, node) = self._candidate.nearest(name, self._shared)
        agreed = nearest[-1] if nearest else None
        return GraphDifference(
            node=node.name or "(without a name)",
            op_type=node.op_type,
            value=name,
            behind=tuple(item.name for item in before),
            error=self._error(name),
            tolerance=self._tolerance,
            agreed=agreed,
            agreed_error=None if agreed is None else self._error(agreed),
        )

    def _before(self, name: str) -> list[str]:
        return [item for item in self._candidate.ancestors(name) if item in self._shared]

    def _differs(self, name: str) -> bool:
        return self._error(name) > self._tolerance

    def _error(self, name: str) -> float:
        if name not in self._errors:
            right, found = self._reference.values([name]), self._candidate.values([name])
            self._errors[name] = relative_error(right[name], found[name])
        return self._errors[name]
