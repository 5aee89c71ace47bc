"""Change the plan while requests run: estimate the link from them, switch for a lasting gain."""

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import Objective, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.estimate import PERCENTILE, PlanConditions, PlanEstimate
from edgeclip.runtime.planning.link_state import HTTP_DOWN, HTTP_UP, LinkState, transfer_ms
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.stats.percentiles import conformal_level

GAIN = 0.10
DWELL_S = 10.0
MAX_AGE_S = 60.0
_SMALL = 4096  # bytes both ways: the time of such a request is a round trip and little else
_KEPT = 64  # observations of each kind
_LEAST_SHARE = 0.1  # of a large request's time that its bytes take at least
_MORE_SPREAD = 2.0  # a difference of two round trips varies more than one of them
_ITERATIONS = 4
_SLOWEST, _FASTEST, _HALVINGS = 1e-3, 1e5, 40  # Mbit/s; bisection of the logarithm
_DRAWS = 1000  # per plan and review: the device reviews its plan while it works


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One request on a kept connection.

    `network_ms` is the time from sending the request to having the response, without the time
    that the server worked on it. `sent` and `received` are bytes of the bodies; `at` is in
    seconds, `number` tells the order.
    """

    at: float
    number: int
    sent: int
    received: int
    network_ms: float


class LinkEstimator:
    """Estimate a `LinkState` from the latest requests. Threads may share one.

    Small requests tell the round trip, including what HTTP costs. Large requests, less the round
    trip beside them and slow start, tell the bandwidth towards the server; both are kept as pairs
    of one moment. What was not observed lately, and
    the bandwidth from the server, are taken from the assumed link.

    Args:
        assumed: the link until something is known.
        max_age_s: older observations are forgotten.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        assumed: LinkState,
        *,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._assumed = assumed
        self._max_age = max_age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._small: deque[Observation] = deque(maxlen=_KEPT)
        self._large: deque[Observation] = deque(maxlen=_KEPT)

    def observe(self, *, sent: int, received: int, network_ms: float) -> None:
        """Add a request that was answered."""
        with self._lock:
            self._count += 1
            seen = Observation(
                at=self._clock(),
                number=self._count,
                sent=sent,
                received=received,
                network_ms=max(0.0, network_ms),
            )
            (self._small if sent + received <= _SMALL else self._large).append(seen)

    def observe_timeout(self, *, sent: int, network_ms: float) -> None:
        """Add a request that was given up after `network_ms`, if that is later than expected.

        Its true time is longer, so an earlier end says nothing.
        """
        link = self.state()
        rtt = float(np.median(link.rtt_ms)) + link.http_ms
        seen = Observation(at=0.0, number=0, sent=sent, received=0, network_ms=network_ms)
        if network_ms > rtt + _upload_at(seen, float(np.median(link.up_mbps)), rtt, link.window):
            self.observe(sent=sent, received=0, network_ms=network_ms)

    def state(self) -> LinkState:
        """Return the link as it is now; paired by time where both kinds of requests were made."""
        assumed = self._assumed
        small, large = self._fresh(self._small), self._fresh(self._large)
        down = float(np.median(assumed.down_mbps)) * assumed.efficiency
        assumed_ups = tuple(rate * assumed.efficiency for rate in assumed.up_mbps)
        ups, rtts, http = assumed_ups, assumed.rtt_ms, assumed.http_ms
        if small:
            http = 0.0
        beside = [_nearest(small, seen) for seen in large] if small else []
        # Round trip and bandwidth depend on each other: bytes take a part of a small request too.
        for _ in range(_ITERATIONS):
            up = float(np.median(ups))
            if small:
                rtts = tuple(
                    max(0.0, seen.network_ms - _bytes_ms(seen, up, down)) for seen in small
                )
            if large:
                expected, rtt = float(np.median(assumed_ups)), float(np.median(rtts)) + http
                of_moments = [rtts[place] for place in beside] or [rtt] * len(large)
                found = _bandwidths(large, of_moments, rtts, expected, down, assumed.window)
                ups = found or assumed_ups
        is_observed = ups is not assumed_ups
        moments = None
        if small and is_observed:
            # Each request is a moment; what it does not tell is taken from the nearest that does.
            seen_at = (*small, *large)
            rtts = tuple(rtts[_nearest(small, seen)] for seen in seen_at)
            ups = tuple(ups[_nearest(large, seen)] for seen in seen_at)
            moments = len(seen_at)
        elif small and len(ups) == 1:
            moments = len(small)
        return LinkState(
            name=f"{assumed.name}, as observed",
            rtt_ms=rtts,
            up_mbps=ups,
            down_mbps=(down,),
            moments=moments,
            loss=0.0 if is_observed else assumed.loss,  # an observed bandwidth includes the loss
            http_ms=http,
            window=assumed.window,
        )

    def _fresh(self, seen: deque[Observation]) -> list[Observation]:
        oldest = self._clock() - self._max_age
        with self._lock:
            return [item for item in seen if item.at >= oldest]


def _bytes_ms(seen: Observation, up: float, down: float) -> float:
    """Return the serialisation time of both messages in milliseconds."""
    return 8e-3 * ((seen.sent + HTTP_UP) / up + (seen.received + HTTP_DOWN) / down)


def _nearest(kind: Sequence[Observation], seen: Observation) -> int:
    """Return the place of the observation that was made nearest to another one."""

    def distance(place: int) -> tuple[float, int]:
        other = kind[place]
        return abs(other.at - seen.at), abs(other.number - seen.number)

    return min(range(len(kind)), key=distance)


def _bandwidths(
    large: Sequence[Observation],
    of_moments: Sequence[float],
    rtts: Sequence[float],
    expected: float,
    down: float,
    window: int,
) -> tuple[float, ...]:
    """Return Mbit/s towards the server by each request; () if they agree with `expected`.

    They agree if their uploads take as long as expected, within the spread of the round trips, and
    vary no more than round trips do. `of_moments` are the round trips beside the requests: what a
    moment's slow round trip explains must not count as bandwidth too.
    """
    both = list(zip(large, of_moments, strict=True))
    late = [
        _upload_ms(seen, rtt, down) - _upload_at(seen, expected, rtt, window) for seen, rtt in both
    ]
    spread, of_late = (
        float(np.subtract(*np.percentile(values, [75, 25]))) for values in (rtts, late)
    )
    if abs(float(np.median(late))) <= spread and of_late <= _MORE_SPREAD * spread:
        return ()
    return tuple(_bandwidth(seen, rtt, down, window) for seen, rtt in both)


def _upload_ms(seen: Observation, rtt_ms: float, down: float) -> float:
    """Return what remains of a request's time for its upload."""
    response = 8e-3 * (seen.received + HTTP_DOWN) / down
    return max(seen.network_ms - rtt_ms - response, _LEAST_SHARE * seen.network_ms, 1e-3)


def _upload_at(seen: Observation, mbps: float, rtt_ms: float, window: int) -> float:
    """Return the milliseconds that the upload takes at a bandwidth, with slow start."""
    sent, rate, rtt = (np.array([float(value)]) for value in (seen.sent, mbps, rtt_ms))
    return float(transfer_ms(sent, rate, rtt, head=HTTP_UP, window=window)[0])


def _bandwidth(seen: Observation, rtt_ms: float, down: float, window: int) -> float:
    """Find the Mbit/s towards the server at which the upload takes as long as it did."""
    spent = _upload_ms(seen, rtt_ms, down)
    low, high = _SLOWEST, _FASTEST
    if _upload_at(seen, high, rtt_ms, window) >= spent:  # the window was open already
        return 8e-3 * (seen.sent + HTTP_UP) / spent
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        too_slow = _upload_at(seen, middle, rtt_ms, window) > spent
        low, high = (middle, high) if too_slow else (low, middle)
    return high


class Hysteresis:
    """Keep a choice until another one was cheaper without a break for some time.

    Args:
        first: the choice to begin with.
        gain: share of the present cost by which another choice must be cheaper.
        dwell_s: seconds for which it must be cheaper, at every update.

    Attributes:
        current: the present choice.
    """

    def __init__(self, first: str, *, gain: float = GAIN, dwell_s: float = DWELL_S) -> None:
        self.current = first
        self._gain, self._dwell = gain, dwell_s
        self._since: dict[str, float] = {}

    def update(self, now: float, costs: Mapping[str, float]) -> str:
        """Take the costs of this moment and return the present choice.

        Args:
            now: seconds, monotonic.
            costs: cost of each choice, at least one. If the present choice is not among
                them, the cheapest replaces it at once.
        """
        if self.current not in costs:
            return self._switch(min(costs, key=costs.__getitem__))
        bound = (1 - self._gain) * costs[self.current]
        better = {name for name, cost in costs.items() if cost < bound}
        self._since = {name: self._since.get(name, now) for name in better}
        lasting = [name for name, since in self._since.items() if now - since >= self._dwell]
        return self._switch(min(lasting, key=costs.__getitem__)) if lasting else self.current

    def _switch(self, name: str) -> str:
        self.current = name
        self._since = {}
        return name


class AdaptivePlan:
    """A plan that follows the link: give it to `SplitRuntime` in place of a `SplitPlan`.

    The runtime tells it of every request and calls `review`. A review estimates the link from
    the latest requests, predicts all plans on it, and changes the plan if another one was
    cheaper by `gain` in all reviews of the last `dwell_s` seconds. While the plan is to send
    nothing, nothing is observed either: after `max_age_s` the assumed link counts again, so that
    a plan which left the server gives it another try. The wait at the server is drawn from the
    latest waits, once there are enough of them; before, from the queue that `conditions` assume.
    `observe` may be called from any thread,
    `review` and `exclude` from one at a time.

    Args:
        manifest: manifest of the cut set.
        device, server: stage times measured on both sides.
        conditions: loads of both sides, and the link that is assumed until requests were made.
        objective: cost and bounds of a plan.
        gain, dwell_s: see `Hysteresis`.
        review_s: seconds between two reviews at least; a review of 40 plans takes some 100 ms
            of one core.
        max_age_s: see `LinkEstimator`.
        clock: seconds, monotonic.

    Raises:
        InputError: the goal of `conditions` is not "embedding", or see `estimate_plans`.
    """

    def __init__(
        self,
        manifest: CutManifest,
        device: StageTimes,
        server: StageTimes,
        conditions: PlanConditions,
        objective: Objective,
        *,
        gain: float = GAIN,
        dwell_s: float = DWELL_S,
        review_s: float = 5.0,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if conditions.goal != "embedding":
            raise InputError("an adaptive plan embeds pictures: use the goal 'embedding'")
        self._times = (manifest, device, server)
        self._conditions = dataclasses.replace(conditions, draws=_DRAWS)
        self._objective = objective
        self._clock, self._review_s = clock, review_s
        self._link = LinkEstimator(conditions.link, max_age_s=max_age_s, clock=clock)
        self._max_age, self._lock = max_age_s, threading.Lock()
        self._waits: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # seconds, and ms
        self._excluded: set[str] = set()
        choice = choose_plan(self._estimates(), objective)
        # What a codec loses does not depend on the link: these need no further reviews.
        self._excluded |= {item.plan.name for item in choice.refused}
        self._current = choice.best
        self._choice = Hysteresis(self._current.plan.name, gain=gain, dwell_s=dwell_s)
        self._reviewed = clock()

    @property
    def current(self) -> SplitPlan:
        """The present plan, with its prediction of the last review."""
        return self._current.plan

    @property
    def link(self) -> LinkState:
        """The link as the latest requests show it."""
        return self._link.state()

    @property
    def is_due(self) -> bool:
        """Whether `review_s` seconds have passed since the last review."""
        return self._clock() - self._reviewed >= self._review_s

    def observe(
        self,
        *,
        sent: int,
        received: int,
        ms: float,
        server_ms: float | None,
        timed_out: bool,
        is_predicted: bool = True,
    ) -> None:
        """Add a request.

        Args:
            sent, received: bytes of the bodies.
            ms: from sending the request to having the response, or to giving it up.
            server_ms: how long the server had it, its wait there included; None for what the plan
                predicts. What is beyond the work that the plan predicts is the wait.
            timed_out: it was given up, and would have taken longer.
            is_predicted: it is what the plan predicts: one picture, to the plan's own model. Of
                another request, what the server worked and what it waited cannot be told apart.
        """
        current = self._current
        if server_ms is None:
            server_ms = current.parts.queue + current.server_ms
        elif is_predicted:
            with self._lock:
                self._waits.append((self._clock(), max(0.0, server_ms - current.server_ms)))
        network_ms = max(0.0, ms - server_ms)
        if timed_out:
            self._link.observe_timeout(sent=sent, network_ms=network_ms)
        else:
            self._link.observe(sent=sent, received=received, network_ms=network_ms)

    def exclude(self, plan: SplitPlan) -> None:
        """Never choose a plan again, such as one whose head cannot be loaded."""
        self._excluded.add(plan.name)
        self._reviewed = -math.inf

    def review(self) -> SplitPlan:
        """Return the present plan, after changing it if another one was better long enough."""
        if not self.is_due:
            return self.current
        self._reviewed = self._clock()
        self._conditions = dataclasses.replace(
            self._conditions, link=self._link.state(), waits_ms=self._observed_waits()
        )
        choice = choose_plan(self._estimates(), self._objective)
        costs = {item.plan.name: self._objective.cost(item) for item in choice.allowed}
        bound = self._objective.deadline_ms
        if bound is not None and choice.meets_deadline:
            late = {item.plan.name for item in choice.allowed if item.p95_ms > bound}
            costs |= dict.fromkeys(late, math.inf)
        name = self._choice.update(self._reviewed, costs)
        self._current = next(item for item in choice.allowed if item.plan.name == name)
        return self.current

    def _observed_waits(self) -> tuple[float, ...]:
        """Return the latest waits; none where they are too few for a 95th percentile."""
        oldest = self._clock() - self._max_age
        with self._lock:
            waits = tuple(wait for at, wait in self._waits if at >= oldest)
        return waits if conformal_level(len(waits)) >= PERCENTILE else ()

    def _estimates(self) -> tuple[PlanEstimate, ...]:
        deadline_ms = self._objective.deadline_ms
        return estimate_plans(
            *self._times,
            self._conditions,
            deadline_ms=deadline_ms,
            exclude=frozenset(self._excluded),
        )
