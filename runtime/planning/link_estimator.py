"""The link as requests that were really made show it."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeclip.runtime.planning.link_state import HTTP_DOWN, HTTP_UP, LinkState, transfer_ms

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
