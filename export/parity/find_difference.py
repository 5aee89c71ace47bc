"""The first node at which a graph goes another way than its reference.

Values that both have by the same name are compared, most of all those of an fp32 graph:
writers of other precisions keep their names and add casts or Q/DQ between them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph import load_graph
from edgeclip.export.graph.graph_values import GraphValues, Opener, relative_error
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import Precision

# Relative errors beyond what rounding alone does to a value inside a sound tower.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.1, "fp8": 0.1}

_TOGETHER = 64  # values compared in one run: few enough for memory


class Reference(Protocol):
    """Right values by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it can tell."""
        ...

    def values(self, names: Collection[str]) -> Mapping[str, NDArray[Any]]:
        """Return some of them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where a graph first differs: all that the node depends on still agrees.

    Attributes:
        node: name of the node in the candidate.
        op_type: its operator.
        value: the value that differs.
        behind: names of the nodes before it whose values the reference does not have, back to
            those that agree; one of these may be the cause.
        error: its relative error, see `relative_error`.
        tolerance: what it was held against.
        agreed: the last compared value that it depends on, None if it depends on inputs only.
        agreed_error: that one's error.
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


def find_difference(
    reference: onnx.ModelProto | Path,
    candidate: onnx.ModelProto | Path,
    inputs: Mapping[str, NDArray[Any]],
    *,
    device: DeviceProfile,
    tolerance: float,
    candidate_inputs: Mapping[str, NDArray[Any]] | None = None,
    open_candidate: Opener | None = None,
) -> Difference | None:
    """Find the first node of `candidate` whose result is not that of `reference`.

    Args:
        reference: the right graph, run on the CPU.
        candidate: the graph in question.
        inputs: both graphs' inputs by name.
        device: how the candidate is run.
        tolerance: the largest relative error of a value that agrees; see `TOLERANCES`.
        candidate_inputs: the candidate's, where they are not the reference's.
        open_candidate: opens the candidate in place of the device's engine.

    Returns:
        None if all values agree.

    Raises:
        ExportError: no output has the same name in both, or a graph cannot be read.
        EngineError: an engine cannot run a graph.
    """
    on_cpu = cpu_like(device)
    return first_difference(
        GraphValues(_loaded(reference), inputs, partial(open_engine, device=on_cpu)),
        GraphValues(
            _loaded(candidate),
            inputs if candidate_inputs is None else candidate_inputs,
            open_candidate or partial(open_engine, device=device),
        ),
        tolerance,
    )


def first_difference(
    reference: Reference, candidate: GraphValues, tolerance: float
) -> Difference | None:
    """Find the first node as `find_difference` does.

    If an output differs, bisection finds a node where a difference begins, with a run of
    both graphs for each of about log2(values) steps. What lies before may differ all the
    same: a graph is no chain, and a softmax or a residual sum can hide a fault that shows
    again later. So all that the node depends on, or where the outputs agree the whole
    graph, is looked through from its beginning, many values in each run.

    Raises:
        ExportError, EngineError: see `find_difference`.
    """
    search = _Search(reference, candidate, tolerance)
    found = search.bisect()
    found = search.earliest(found) or found
    return None if found is None else search.describe(found)


class _Search:
    """Both graphs' values of the same name, and what was compared so far."""

    def __init__(self, reference: Reference, candidate: GraphValues, tolerance: float) -> None:
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
        """Return the first value before `last` that differs, in a run of its own too."""
        names = self._before(last) if last else self._candidate.names
        names = [name for name in names if name in self._shared]
        for start in range(0, len(names), _TOGETHER):
            part = names[start : start + _TOGETHER]
            right, found = self._reference.values(part), self._candidate.values(part)
            for name in part:
                error = relative_error(right[name], found[name])
                if error > self._tolerance and self._differs(name):
                    return name
        return None

    def describe(self, name: str) -> Difference:
        """Say what is known of a value that differs."""
        nearest, (*before, node) = self._candidate.nearest(name, self._shared)
        agreed = nearest[-1] if nearest else None
        return Difference(
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


def cpu_like(device: DeviceProfile) -> DeviceProfile:
    """Return a CPU with the threads of `device`, on which every precision may run."""
    return DeviceProfile(
        name="cpu",
        description="the CPU of this machine",
        engine="onnxruntime-cpu",
        precisions=("fp32", "fp16", "int8"),
        threads=device.threads,
        memory_mb=None,
    )


def _loaded(graph: onnx.ModelProto | Path) -> onnx.ModelProto:
    return load_graph(graph) if isinstance(graph, Path) else graph
