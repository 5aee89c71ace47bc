"""Choose a split plan: predict all plans, drop those out of bounds, take the cheapest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate, estimate_plan
from edgeclip.runtime.planning.plan import list_candidates
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.wire.codec import FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The cost to minimise, and the bounds that must hold.

    The cost is the 95th percentile of latency in milliseconds; the weights convert energy,
    bytes and server time into milliseconds.

    Attributes:
        ms_per_joule: weight of the device's energy, if it was measured.
        ms_per_megabyte: weight of the bytes sent, at their 95th percentile.
        ms_per_server_second: weight of the server's time.
        deadline_ms: bound of the 95th percentile.
        mean_cosine, least_cosine: bounds of the embeddings' cosine after a codec, over the
            pictures.
    """

    ms_per_joule: Annotated[float, Ge(0)] = 0.0
    ms_per_megabyte: Annotated[float, Ge(0)] = 0.0
    ms_per_server_second: Annotated[float, Ge(0)] = 0.0
    deadline_ms: Annotated[float | None, Gt(0)] = None
    mean_cosine: Annotated[float, Ge(-1)] = 0.99
    least_cosine: Annotated[float, Ge(-1)] = 0.97

    def __post_init__(self) -> None:
        check_bounds(self)

    def cost(self, item: PlanEstimate) -> float:
        """Return the cost of a plan in milliseconds; energy counts only if it was measured."""
        sent = (item.plan.bytes_p95 or 0) / 1e6
        return (
            item.p95_ms
            + self.ms_per_joule * (item.joules or 0.0)
            + self.ms_per_megabyte * sent
            + self.ms_per_server_second * item.server_ms / 1e3
        )

    def too_inexact(self, item: PlanEstimate) -> bool:
        """Return whether the codec of a plan loses more than the bounds allow."""
        inexact = item.cosine_mean < self.mean_cosine or item.cosine_least < self.least_cosine
        return inexact and item.plan.codec is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """The chosen plan and the alternatives.

    Attributes:
        best: the chosen plan.
        allowed: all plans that are exact enough, the cheapest first.
        refused: the others, the cheapest first.
        meets_deadline: False if no plan does; `best` is then the fastest.
    """

    best: PlanEstimate
    allowed: tuple[PlanEstimate, ...]
    refused: tuple[PlanEstimate, ...]
    meets_deadline: bool

    def best_of_each(self) -> tuple[PlanEstimate, ...]:
        """Return the allowed plans, only the cheapest codec of each thing that is sent."""
        found: dict[object, PlanEstimate] = {self._sends(self.best): self.best}
        for item in self.allowed:
            found.setdefault(self._sends(item), item)
        return tuple(item for item in self.allowed if found[self._sends(item)] is item)

    @staticmethod
    def _sends(item: PlanEstimate) -> object:
        return item.plan.kind, item.plan.cut, item.plan.codec == FILE


def estimate_plans(
    manifest: CutManifest,
    device: StageTimes,
    server: StageTimes,
    conditions: PlanConditions,
    *,
    deadline_ms: float | None = None,
    index: str = "index",
    exclude: frozenset[str] = frozenset(),
) -> tuple[PlanEstimate, ...]:
    """Predict every plan of a cut set.

    Args:
        manifest: manifest of the cut set.
        device, server: stage times measured on both sides.
        conditions: link, loads and goal.
        deadline_ms: deadline of every plan.
        index: the server's index model, for the goal "search".
        exclude: names of plans to leave out.

    Raises:
        InputError: times of another tower, or of only some of its cuts.
    """
    device.check_same_tower(manifest, "the cut set")
    device.check_same_tower(server, "what was measured on the server")
    candidates = list_candidates(
        manifest, device, goal=conditions.goal, index=index, deadline_ms=deadline_ms
    )
    return tuple(
        estimate_plan(item, device, server, conditions)
        for item in candidates
        if item.plan.name not in exclude
    )


def choose_plan(estimates: Sequence[PlanEstimate], objective: Objective) -> PlanChoice:
    """Choose the cheapest plan among those that are exact enough and keep the deadline.

    The plan of the device alone sends nothing and is always exact enough.
    """
    ordered = sorted(estimates, key=objective.cost)
    allowed = tuple(item for item in ordered if not objective.too_inexact(item))
    refused = tuple(item for item in ordered if objective.too_inexact(item))
    bound = objective.deadline_ms
    in_time = [item for item in allowed if bound is None or item.p95_ms <= bound]
    best = in_time[0] if in_time else min(allowed, key=lambda item: item.p95_ms)
    return PlanChoice(best=best, allowed=allowed, refused=refused, meets_deadline=bool(in_time))
