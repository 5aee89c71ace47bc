"""Follow the link while requests run, and change the plan for a gain that is large and lasts."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.estimate import Conditions, Estimate
from edgeclip.runtime.planning.link_state import HTTP_DOWN, HTTP_UP, LinkState, transfer_ms
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.planning.planner import Objective, choose, estimate_all
from edgeclip.runtime.planning.stage_times import StageTimes

_SMALL = 4096  # bytes both ways: their time is a round trip and little else
_KEPT = 64  # observations of each kind
_LEAST_SHARE = 0.1  # of a large request's time that its bytes take at least
_ITERATIONS = 4
_SLOWEST, _FASTEST, _HALVINGS = 1e-3, 1e5, 40  # Mbit/s; of their ratio's logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One request on a kept connection.

    `network_ms` is the time from sending it to having the answer, less what the server says
    that it worked on it. `sent` and `received` are bytes of the bodies.
    """

    at: float
    sent: int
    received: int
    network_ms: float


class LinkEstimator:
    """Keeps the last requests and turns them into a `LinkState`.

    Small requests tell the round trip, with what HTTP costs; large ones, less that and less
    what slow start costs, the bandwidth towards the server. What was not seen lately, and the
    bandwidth back, are taken from the link that was assumed.

    Args:
        assumed: until something is known.
        max_age_s: older requests are forgotten.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        assumed: LinkState,
        *,
        max_age_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._assumed = assumed
        self._max_age = max_age_s
        self._clock = clock
        self._small: deque[Observation] = deque(maxlen=_KEPT)
        self._large: deque[Observation] = deque(maxlen=_KEPT)

    def observe(self, *, sent: int, received: int, network_ms: float) -> None:
        """Take note of a request that was answered; one that was not tells nothing here."""
        seen = Observation(
            at=self._clock(), sent=sent, received=received, network_ms=max(0.0, network_ms)
        )
        (self._small if sent + received <= _SMALL else self._large).append(seen)

    @property
    def is_stale(self) -> bool:
        """Whether nothing was seen lately, so that a small request would be worth sending."""
        return not self._fresh(self._small) and not self._fresh(self._large)

    def state(self) -> LinkState:
        """The link as it is now."""
        assumed = self._assumed
        small, large = self._fresh(self._small), self._fresh(self._large)
        down = float(np.median(assumed.down_mbps)) * assumed.efficiency
        assumed_ups = tuple(rate * assumed.efficiency for rate in assumed.up_mbps)
        ups, rtts, http = assumed_ups, assumed.rtt_ms, assumed.http_ms
        if small:
            http = 0.0
        # Each follows from the other: bytes take a share of a small request's time too.
        for _ in range(_ITERATIONS):
            up = float(np.median(ups))
            if small:
                rtts = tuple(
                    max(0.0, seen.network_ms - _bytes_ms(seen, up, down)) for seen in small
                )
            rtt = float(np.median(rtts)) + http
            if large:
                expected = float(np.median(assumed_ups))
                ups = _bandwidths(large, rtts, rtt, expected, down, assumed.window) or assumed_ups
        seen_up = ups is not assumed_ups
        return LinkState(
            name=f"{assumed.name}, as seen",
            rtt_ms=rtts,
            up_mbps=ups,
            down_mbps=(down,),
            loss=0.0 if seen_up else assumed.loss,  # the bandwidth that was seen has it already
            http_ms=http,
            window=assumed.window,
        )

    def _fresh(self, seen: deque[Observation]) -> list[Observation]:
        oldest = self._clock() - self._max_age
        return [item for item in seen if item.at >= oldest]


def _bytes_ms(seen: Observation, up: float, down: float) -> float:
    """What the bytes themselves take, in milliseconds."""
    return 8e-3 * ((seen.sent + HTTP_UP) / up + (seen.received + HTTP_DOWN) / down)


def _bandwidths(
    large: Sequence[Observation],
    rtts: Sequence[float],
    rtt_ms: float,
    expected: float,
    down: float,
    window: int,
) -> tuple[float, ...]:
    """Mbit/s towards the server by each request; () where they tell nothing new.

    They do not where what their bytes take is as expected, within what round trips vary by.
    """
    late = [
        _upload_ms(seen, rtt_ms, down) - _takes_ms(seen, expected, rtt_ms, window) for seen in large
    ]
    low, high = np.percentile(rtts, [25, 75])
    if abs(float(np.median(late))) <= high - low:
        return ()
    return tuple(_bandwidth(seen, rtt_ms, down, window) for seen in large)


def _upload_ms(seen: Observation, rtt_ms: float, down: float) -> float:
    """What is left of a request's time for its bytes to cross."""
    answer = 8e-3 * (seen.received + HTTP_DOWN) / down
    return max(seen.network_ms - rtt_ms - answer, _LEAST_SHARE * seen.network_ms, 1e-3)


def _takes_ms(seen: Observation, mbps: float, rtt_ms: float, window: int) -> float:
    """What they would take at some bandwidth."""
    sent, rate, rtt = (np.array([float(value)]) for value in (seen.sent, mbps, rtt_ms))
    return float(transfer_ms(sent, rate, rtt, head=HTTP_UP, window=window)[0])


def _bandwidth(seen: Observation, rtt_ms: float, down: float, window: int) -> float:
    """Mbit/s towards the server at which the request takes as long as it did."""
    spent = _upload_ms(seen, rtt_ms, down)
    low, high = _SLOWEST, _FASTEST
    if _takes_ms(seen, high, rtt_ms, window) >= spent:  # the window was open already
        return 8e-3 * (seen.sent + HTTP_UP) / spent
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        too_slow = _takes_ms(seen, middle, rtt_ms, window) > spent
        low, high = (middle, high) if too_slow else (low, middle)
    return high


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
