"""A plan that follows the link: it changes for a gain that is large and that lasts."""

import dataclasses
import time
from collections.abc import Callable, Mapping

from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.estimate import Conditions, Estimate
from edgeclip.runtime.planning.link_estimator import LinkEstimator
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.planning.planner import Objective, choose, estimate_all
from edgeclip.runtime.planning.stage_times import StageTimes

GAIN = 0.10
DWELL_S = 10.0
_DRAWS = 1000  # a device reviews its plan while it works


class Hysteresis:
    """Stays with one of several things until another was better for a while, all the time.

    Args:
        first: where to begin.
        gain: by what share of the present cost another one must be cheaper.
        dwell_s: for how long, at every step.

    Attributes:
        current: the present one.
    """

    def __init__(self, first: str, *, gain: float = GAIN, dwell_s: float = DWELL_S) -> None:
        self.current = first
        self._gain, self._dwell = gain, dwell_s
        self._since: dict[str, float] = {}

    def step(self, now: float, costs: Mapping[str, float]) -> str:
        """Look at the costs of this moment; return the present choice.

        Args:
            now: seconds, never going back.
            costs: of all that may be chosen, at least one. If the present choice is not among
                them, the cheapest takes its place at once.
        """
        if self.current not in costs:
            return self._take(min(costs, key=costs.__getitem__))
        bound = (1 - self._gain) * costs[self.current]
        better = {name for name, cost in costs.items() if cost < bound}
        self._since = {name: self._since.get(name, now) for name in better}
        lasting = [name for name, since in self._since.items() if now - since >= self._dwell]
        return self._take(min(lasting, key=costs.__getitem__)) if lasting else self.current

    def _take(self, name: str) -> str:
        self.current = name
        self._since = {}
        return name


class LivePlan:
    """The plan for now: reviewed from time to time with the link as requests show it.

    Args:
        manifest: of the cut set.
        device, server: what was measured on both sides.
        conditions: goal, loads, and the link that is assumed until requests were made.
        objective: what counts.
        gain, dwell_s: see `Hysteresis`.
        review_s: no more often than this is anything predicted anew.
        clock: seconds, never going back.

    Attributes:
        link: tell it of every request, see `LinkEstimator.observe`.

    Raises:
        InputError: see `estimate_all`.
    """

    def __init__(
        self,
        manifest: CutManifest,
        device: StageTimes,
        server: StageTimes,
        conditions: Conditions,
        objective: Objective,
        *,
        gain: float = GAIN,
        dwell_s: float = DWELL_S,
        review_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._towers = (manifest, device, server)
        self._conditions = dataclasses.replace(conditions, draws=_DRAWS)
        self._objective = objective
        self._clock, self._review = clock, review_s
        self.link = LinkEstimator(conditions.link, clock=clock)
        choice = choose(self._estimates(), objective)
        self._plans = {choice.best.plan.name: choice.best.plan}
        self._chosen = Hysteresis(choice.best.plan.name, gain=gain, dwell_s=dwell_s)
        self._reviewed = clock()

    @property
    def current(self) -> SplitPlan:
        """The plan for now, predicted as at the last review."""
        return self._plans[self._chosen.current]

    def review(self, *, utilisation: float | None = None) -> SplitPlan:
        """Return the plan for now, changing it if another one has long been better.

        Args:
            utilisation: of the server, where it tells.
        """
        now = self._clock()
        if now - self._reviewed < self._review:
            return self.current
        self._reviewed = now
        if utilisation is not None:
            self._conditions = dataclasses.replace(
                self._conditions, utilisation=min(max(0.0, utilisation), 0.99)
            )
        self._conditions = dataclasses.replace(self._conditions, link=self.link.state())
        choice = choose(self._estimates(), self._objective)
        self._plans = {item.plan.name: item.plan for item in choice.allowed}
        costs = {item.plan.name: self._objective.cost(item) for item in choice.allowed}
        bound = self._objective.deadline_ms
        if bound is not None and choice.meets_deadline:
            late = {item.plan.name for item in choice.allowed if item.p95_ms > bound}
            costs |= dict.fromkeys(late, float("inf"))
        self._chosen.step(now, costs)
        return self.current

    def _estimates(self) -> tuple[Estimate, ...]:
        return estimate_all(
            *self._towers, self._conditions, deadline_ms=self._objective.deadline_ms
        )
