"""Profile the layers of a tower: time each node of its graph by ONNX Runtime's own trace."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeclip.profiles.layers.node_costs import TensorType, node_bytes, node_flops
from edgeclip.profiles.layers.summarize_layers import Layer, run_alternately, summarize_layers
from edgeclip.profiles.measure.subject import example_feed
from edgeclip.profiles.record.measurement import LayerProfile
from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine, make_ort_engine
from edgeclip.runtime.engines.providers import CPU, provider_of
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import open_tower

_KERNEL = "_kernel_time"
_HOLDS_NODES = {"If", "Loop", "Scan"}  # the nodes inside have events of their own


@dataclass(frozen=True, slots=True)
class NodeKey:
    """Key of a node in the optimised graph, where names may repeat."""

    name: str
    op: str
    index: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One run of one node.

    `inputs` and `outputs` are types and shapes; inputs that the node does not have, or whose
    kernel holds its own copy of them, are left out.
    """

    key: NodeKey
    provider: str
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    ms: float


def read_trace(path: Path) -> list[list[NodeRun]]:
    """Read a trace of ONNX Runtime: the nodes of each run, in order.

    Raises:
        EngineError: the file cannot be read, or is not such a trace.
    """
    try:
        return parse_trace(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"ONNX Runtime's trace cannot be read ({error!r}): use a released onnxruntime"
        ) from error


def parse_trace(events: Iterable[dict[str, Any]]) -> list[list[NodeRun]]:
    """Sort the events of a trace by runs; a run that did not end is left out."""
    runs: list[list[NodeRun]] = []
    nodes: list[NodeRun] = []
    for event in events:
        kind, name = event["cat"], event["name"]
        if (kind, name) == ("Session", "model_run"):
            runs.append(nodes)
            nodes = []
        elif kind == "Node" and name.endswith(_KERNEL):
            node = _node(name.removesuffix(_KERNEL), event)
            if node.key.op not in _HOLDS_NODES:
                nodes.append(node)
    return runs


def _node(name: str, event: dict[str, Any]) -> NodeRun:
    facts = event["args"]
    return NodeRun(
        key=NodeKey(name, facts["op_name"], str(facts.get("node_index", ""))),
        provider=facts["provider"],
        inputs=_tensors(facts.get("input_type_shape") or ()),
        outputs=_tensors(facts.get("output_type_shape") or ()),
        ms=event["dur"] / 1e3,
    )


def _tensors(listed: Sequence[dict[str, list[int]]]) -> tuple[TensorType, ...]:
    return tuple((kind, tuple(shape)) for item in listed for kind, shape in item.items())


_NO_PREPACKING = {"session.disable_prepacking": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """Arguments of `open_engine` for one graph."""

    path: Path
    content: bytes | None = None
    data_folder: Path | None = None
    context_length: int | None = None


def profile_layers(
    bundle: Bundle,
    tower: Tower,
    precision: Precision,
    device: DeviceProfile,
    *,
    runs: int = 50,
    warm_up: int = 10,
) -> LayerProfile:
    """Time each layer of a tower on its first golden input.

    Args:
        bundle: what holds the tower.
        tower, precision: which of its graphs; batch 1, or the only batch that the graph takes.
        device: says which engine to use.
        runs: that are counted, at least 1.
        warm_up: runs before them.

    Raises:
        BundleError: see `Bundle.tower_bytes`.
        EngineError: the tower cannot be loaded, run or profiled.
        InputError: `runs` is below 1 or `warm_up` below 0.
        MissingExtraError: the engine's package is not installed.
    """
    feed = example_feed(bundle, tower, precision)
    if device.engine in ("tensorrt", "tensorrt-rtx"):
        from edgeclip.profiles.layers.tensorrt_layers import profile_tensorrt

        plain, profiled = (open_tower(bundle, tower, precision, device) for _ in range(2))
        return profile_tensorrt(plain, profiled, feed, device, runs=runs, warm_up=warm_up)
    data = bundle.manifest.tower(tower).file(precision).data_path
    graph = _Graph(
        path=bundle.tower_path(tower, precision),
        content=bundle.tower_bytes(tower, precision),
        data_folder=None if data is None else (bundle.path / data).parent,
        context_length=bundle.manifest.spec.text.context_length if tower == "text" else None,
    )
    return _profile(graph, feed, device, runs=runs, warm_up=warm_up)


def profile_layers_of(
    model: Path | bytes, feed: Tensors, device: DeviceProfile, *, runs: int = 50, warm_up: int = 10
) -> LayerProfile:
    """Time each layer of any ONNX graph; see `profile_layers`.

    Args:
        model: a file, its data files beside it; or the bytes of a graph that has none.
        feed: its inputs by name.
        device: one whose engine is ONNX Runtime.
        runs, warm_up: see `profile_layers`.

    Raises:
        EngineError, InputError, MissingExtraError: see `profile_layers`.
    """
    if isinstance(model, bytes):
        graph = _Graph(path=Path("model.onnx"), content=model)
    else:
        graph = _Graph(path=model)
    return _profile(graph, feed, device, runs=runs, warm_up=warm_up)


def _profile(
    graph: _Graph, feed: Tensors, device: DeviceProfile, *, runs: int, warm_up: int
) -> LayerProfile:
    provider = provider_of(device).name
    times, counted = _run(graph, feed, device, runs, warm_up)
    known = _with_weights(graph, feed, device) if provider == CPU else {}
    nodes = {node.key: node for run in counted for node in run}
    layers = {key: _layer(known.get(key, node), node.provider) for key, node in nodes.items()}
    where = "" if device.on_cpu else ", the host's time alone"
    return summarize_layers(
        f"ONNX Runtime profiling{where}", layers, [_sums(run) for run in counted], times
    )


def _run(
    graph: _Graph, feed: Tensors, device: DeviceProfile, runs: int, warm_up: int
) -> tuple[tuple[float, ...], list[list[NodeRun]]]:
    """Time plain runs in milliseconds, and return them with the nodes of the profiled ones."""
    plain = open_engine(
        graph.path,
        device=device,
        content=graph.content,
        data_folder=graph.data_folder,
        context_length=graph.context_length,
    )
    with ExitStack() as stack:
        traced = _open_traced(graph, device, stack)
        times = run_alternately(
            partial(plain.run, feed), partial(traced.run, feed), runs=runs, warm_up=warm_up
        )
        counted = traced.finish()[warm_up:]
    if not counted:
        raise EngineError(f"ONNX Runtime lost the trace of {graph.path}: ask for fewer runs")
    return times, counted


def _with_weights(graph: _Graph, feed: Tensors, device: DeviceProfile) -> dict[NodeKey, NodeRun]:
    """Nodes with their weights among the inputs; empty where the graph does not run like that."""
    with ExitStack() as stack, suppress(EngineError):
        engine = _open_traced(graph, device, stack, _NO_PREPACKING)
        engine.run(feed)
        return {node.key: node for run in engine.finish() for node in run}
    return {}


def _layer(node: NodeRun, provider: str) -> Layer:
    return Layer(
        name=node.key.name,
        op=node.key.op,
        provider=provider,
        flops=node_flops(node.key.op, node.inputs, node.outputs),
        bytes=node_bytes(node.key.op, node.inputs, node.outputs),
    )


def _sums(nodes: Iterable[NodeRun]) -> dict[NodeKey, float]:
    """Sum the milliseconds of one run by node; one inside a loop runs more than once."""
    found: dict[NodeKey, float] = {}
    for node in nodes:
        found[node.key] = found.get(node.key, 0.0) + node.ms
    return found


class _TracedEngine(OrtEngine):
    """An engine whose session profiles each run.

    Args:
        folder: where the trace is written.
        settings: see `OrtEngine`.
    """

    def __init__(self, path: Path, folder: Path, **settings: Any) -> None:
        self._folder = folder
        self._trace: list[list[NodeRun]] | None = None
        super().__init__(path, **settings)

    def finish(self) -> list[list[NodeRun]]:
        """End the profiling and return the nodes of each run; a second call gives the same.

        Raises:
            EngineError: the trace cannot be read.
        """
        if self._trace is None:
            self._trace = []
            self._trace = read_trace(Path(self._session.end_profiling()))
        return self._trace

    def _load(self, ort: Any, graph: Path | bytes, options: Any, chain: list[Any]) -> Any:
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / "trace")
        return super()._load(ort, graph, options, chain)


def _open_traced(
    graph: _Graph,
    device: DeviceProfile,
    stack: ExitStack,
    entries: Mapping[str, str] | None = None,
) -> _TracedEngine:
    """Open an engine that traces its runs; the trace ends, and its folder goes, with `stack`."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeclip-trace-"))
    engine = make_ort_engine(
        partial(_TracedEngine, folder=Path(folder)),
        graph.path,
        device=device,
        content=graph.content,
        data_folder=graph.data_folder,
        context_length=graph.context_length,
        entries=entries,
    )
    stack.callback(engine.finish)  # it would write its file after the folder is gone
    return engine
