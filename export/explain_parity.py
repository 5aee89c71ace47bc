"""Why a tower missed its parity gate: the first place where it goes another way.

A tower is made in steps, and each is held against the one before: the student's forward
pass in torch, that of the tower module, what torch captured of it, the ONNX graph on the
engine; then the graphs in other precisions against the one in fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.capture import capture
from edgeclip.export.cut_graph import GraphValues, relative_error
from edgeclip.export.embed_pairs import Embedder, graph_embedder, torch_embedder, tower_inputs
from edgeclip.export.find_difference import TOLERANCES, find_difference, first_difference
from edgeclip.export.graph import load_graph
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.torch_values import TorchValues
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.towers import tower_module
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.engine import open_engine
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.tower_feed import tower_feed

_SEARCHED = 128  # pairs, as many as the gate sees
_WORST = 4  # of these, how many are looked at
_UNSEEN = (
    "no value differs on the worst inputs: the cause is in the engine's way of running batches"
)


def explain_parity(
    dual: DualEncoder, graph: TowerGraph, source: Source, device: DeviceProfile, form: GraphForm
) -> str:
    """Say where an fp32 graph leaves torch, in one line; for the message of a missed gate.

    The tower is captured once more, which takes as long as its export.

    Args:
        dual: the student.
        graph: its tower in fp32.
        source: the pairs of the gate; the worst are looked at.
        device: what runs the graph.
        form: how it was captured.

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
    tolerance = TOLERANCES["fp32"]
    in_torch = _differing_module(dual.model, (forward, module), given, tolerance)
    if in_torch is not None:
        return f"before any export, {type(module).__name__} differs from the student {in_torch}"
    captured = TorchValues(capture(dual, graph.tower, form), (given,))
    if relative_error(reference(values), captured.results[0]) > tolerance:
        return f"torch.export captured something else than {type(module).__name__} computes"
    feed = tower_feed(values, graph.tower, graph.pixels, dual.spec.image)
    on_engine = GraphValues(load_graph(graph.path), feed, partial(open_engine, device=device))
    return str(first_difference(captured, on_engine, tolerance) or _UNSEEN)


def explain_precision(
    dual: DualEncoder,
    reference: TowerGraph,
    graph: TowerGraph,
    source: Source,
    device: DeviceProfile,
    form: GraphForm,
) -> str:
    """Say where a graph in another precision leaves the fp32 one, in one line.

    Rounding adds up over a tower. Where no single node is to blame, the one is named after
    which half of the final error is there.

    Raises:
        EngineError: an engine cannot run a graph.
    """
    spec = dual.spec.image
    embedders = tuple(graph_embedder(item, spec, device) for item in (reference, graph))
    values = _worst_inputs(dual, graph.tower, source, embedders, form.batch)
    right, found = (embed(values) for embed in embedders)
    tolerance = min(TOLERANCES[graph.precision], relative_error(right, found) / 2)
    difference = find_difference(
        reference.path,
        graph.path,
        tower_feed(values, graph.tower, reference.pixels, spec),
        candidate_inputs=tower_feed(values, graph.tower, graph.pixels, spec),
        device=device,
        tolerance=tolerance,
    )
    return str(difference or _UNSEEN)


def _worst_inputs(
    dual: DualEncoder,
    tower: Tower,
    source: Source,
    embedders: tuple[Embedder, ...],
    batch: int | None,
) -> NDArray[Any]:
    """Return the inputs whose embeddings by the two embedders are furthest apart, of one batch."""
    most, found = -1.0, None
    inputs = tower_inputs(source, tower, dual.spec, dual.text_tokenizer, count=_SEARCHED)
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
    """Compare two forward passes over the same modules; say from which one on they differ."""
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
    """What each module without parts gives at its first call, in order; "" is the embedding."""
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
