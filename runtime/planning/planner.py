"""Choose a plan: predict all of them, drop those out of bounds, take the cheapest."""

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
    """What is made as small as possible, and what must hold.

    The 95th percentile counts in milliseconds; the weights say how many of them something
    else is worth.

    Attributes:
        ms_per_joule: of the device's energy, where it was measured.
        ms_per_megabyte: of bytes sent, at their 95th percentile.
        ms_per_server_second: of the server's time.
        deadline_ms: bound of the 95th percentile.
        mean_cosine, least_cosine: bounds of what a codec may cost, over the pictures.
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
        """What a plan costs, in milliseconds; energy that was not measured is left out."""
        sent = (item.plan.bytes_p95 or 0) / 1e6
        return (
            item.p95_ms
            + self.ms_per_joule * (item.joules or 0.0)
            + self.ms_per_megabyte * sent
            + self.ms_per_server_second * item.server_ms / 1e3
        )

    def too_inexact(self, item: PlanEstimate) -> bool:
        """Whether its codec costs more than is allowed."""
        inexact = item.cosine_mean < self.mean_cosine or item.cosine_least < self.least_cosine
        return inexact and item.plan.codec is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """The plan that was chosen.

    Attributes:
        best: the chosen one.
        allowed: all that are exact enough, the cheapest first.
        refused: those that are not, likewise.
        meets_deadline: False if no plan does; `best` is then the soonest.
    """

    best: PlanEstimate
    allowed: tuple[PlanEstimate, ...]
    refused: tuple[PlanEstimate, ...]
    meets_deadline: bool

    def best_of_each(self) -> tuple[PlanEstimate, ...]:
        """The allowed plans without those that send the same in a dearer codec."""
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
) -> tuple[PlanEstimate, ...]:
    """Predict every plan of a cut set.

    Args:
        manifest: of the cut set.
        device: what `measure_cuts` found on the device.
        server: and on the server.
        conditions: link, loads and goal.
        deadline_ms: of every plan.
        index: the server's model that a search asks.

    Raises:
        InputError: times of another tower, or of only some of its cuts.
    """
    device.check_same_tower(manifest, "the cut set")
    device.check_same_tower(server, "what was measured on the server")
    candidates = list_candidates(
        manifest, device, goal=conditions.goal, index=index, deadline_ms=deadline_ms
    )
    return tuple(estimate_plan(item, device, server, conditions) for item in candidates)


def choose_plan(estimates: Sequence[PlanEstimate], objective: Objective) -> PlanChoice:
    """Take the plan of least cost among those that are exact enough and keep the deadline.

    The device alone sends nothing and is always exact enough.
    """
    ordered = sorted(estimates, key=objective.cost)
    allowed = tuple(item for item in ordered if not objective.too_inexact(item))
    refused = tuple(item for item in ordered if objective.too_inexact(item))
    bound = objective.deadline_ms
    in_time = [item for item in allowed if bound is None or item.p95_ms <= bound]
    best = in_time[0] if in_time else min(allowed, key=lambda item: item.p95_ms)
    return PlanChoice(best=best, allowed=allowed, refused=refused, meets_deadline=bool(in_time))
