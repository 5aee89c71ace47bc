"""Find the first node at which a graph's values differ from a reference's.

Values are compared by name. A graph in another precision keeps the names of the fp32 graph it was
made from, with casts or Q/DQ nodes between them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_values import GraphValues, relative_error

_TOGETHER = 64  # values compared in one run: few enough for memory


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
        for start in range(0, len(names), _TOGETHER):
            part = names[start : start + _TOGETHER]
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
