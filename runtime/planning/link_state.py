"""Model of a network link: how long a request on it takes.

One request on a connection that is kept open takes (Cardwell, Savage and Anderson, "Modeling
TCP Latency", INFOCOM 2000, without its connection setup)

    RTT + sum over both directions of (8 B / (eta BW) + stalls + recovery)

- 8 B / (eta BW): B bytes at BW, of which headers leave the share eta to payload.
- stalls: after a pause the congestion window begins at 10 segments (RFC 6928) and doubles
  every round trip; until it covers the link, the sender waits RTT - w / BW in each round. The
  head of a message is sent by itself and fills a segment.
  With loss p it does not grow beyond sqrt(1.5 / p) segments (Mathis et al., "The Macroscopic
  Behavior of the TCP Congestion Avoidance Algorithm", 1997).
- recovery: n segments lose one before the last with 1 - (1 - p)^(n - 1); it is sent again
  5/4 RTT later. The last one is missed only by a timer: 2 RTT, and in half of the cases 200 ms
  more, where what came before it was acknowledged in time (RFC 8985, as Linux has it).

Round trip and bandwidth are not independent: a link that is busy or far from its mast is slow in
both. Added as if they were, they promise too short a 95th percentile. Observed ones are drawn as
pairs of one moment. Of a profile only the spread of each is known; then the slowest round trip is
taken together with the lowest bandwidths (comonotone times, the cautious end of what is possible).

What this leaves out: that a loss makes the next requests slower too, a retransmission that is
lost again, queues that other traffic fills, and whatever a radio does before the first packet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.device.link import LinkProfile
from edgeclip.runtime.device.schema import check_bounds

SEGMENT = 1448  # bytes of payload in an Ethernet frame, with TCP timestamps
FIRST_WINDOW = 10  # segments, RFC 6928
# What HTTP adds to a body, in bytes: request line, status line, and headers of both programs.
HTTP_UP, HTTP_DOWN = 330, 190
_PROBE_MS = 2.0
_LONE_MS = 200.0  # for a delayed acknowledgement
_PROFILE_SAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """A link, as samples of its round trip and bandwidths.

    Attributes:
        name: readable name.
        rtt_ms: round-trip time of a small request on a kept connection; with `http_ms` 0 it
            includes what HTTP costs on both sides.
        up_mbps, down_mbps: 10^6 bits per second of payload, from the device and to it.
        moments: number of observed moments; value i of each of the three is then of moment i, or
            it is one value for all. None where their samples do not belong together.
        loss: share of packets lost.
        efficiency: eta, the payload's share if the bandwidths count headers too.
        http_ms: what HTTP adds on both sides, if `rtt_ms` is that of packets.
        window: segments that may be sent at once when a request begins.

    Raises:
        ValueError: no samples, a value out of bounds, or not one sample a moment.
    """

    name: str
    rtt_ms: tuple[float, ...]
    up_mbps: tuple[float, ...]
    down_mbps: tuple[float, ...]
    moments: Annotated[int | None, Ge(1)] = None
    loss: Annotated[float, Ge(0), Lt(1)] = 0.0
    efficiency: Annotated[float, Gt(0)] = 1.0
    http_ms: Annotated[float, Ge(0)] = 0.0
    window: Annotated[int, Ge(1)] = FIRST_WINDOW

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("rtt_ms", "up_mbps", "down_mbps"):
            values = getattr(self, name)
            least = 0.0 if name == "rtt_ms" else math.ulp(0.0)
            if not values or not all(math.isfinite(v) and v >= least for v in values):
                raise ValueError(f"{name} needs samples, all of them positive")
            if self.moments is not None and len(values) not in (1, self.moments):
                raise ValueError(f"{name} needs one sample for each of {self.moments} moments")

    @classmethod
    def from_profile(cls, link: LinkProfile, *, http_ms: float = 0.0, seed: int = 0) -> "LinkState":
        """Make the state of a link from its profile.

        Round trips are drawn from the lognormal distribution with the profile's median and
        standard deviation. The profile's bandwidths are of payload.
        """
        median, spread = link.rtt_ms, link.jitter_ms
        if median > 0 and spread > 0:
            # The variance of a lognormal is median^2 q (q - 1), with q = exp(sigma^2).
            q = (1 + math.sqrt(1 + 4 * (spread / median) ** 2)) / 2
            draws = np.random.default_rng(seed).standard_normal(_PROFILE_SAMPLES)
            rtt = tuple((median * np.exp(math.sqrt(math.log(q)) * draws)).tolist())
        else:
            rtt = (median,)
        return cls(
            name=link.name,
            rtt_ms=rtt,
            up_mbps=(link.up_mbps,),
            down_mbps=(link.down_mbps,),
            loss=link.loss,
            http_ms=http_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDraws:
    """A link at drawn moments: milliseconds, and 10^6 bits of payload per second; each [draws]."""

    rtt: Values
    up: Values
    down: Values


def draw_link(link: LinkState, count: int, rng: np.random.Generator) -> LinkDraws:
    """Draw round trips and bandwidths that belong together, see the module.

    Args:
        link: the link.
        count: number of draws.
        rng: random generator.
    """
    if link.moments is not None:
        moments = draw_evenly(link.moments, count, rng)
        rtt, up, down = (
            np.array(values)[moments % len(values)]
            for values in (link.rtt_ms, link.up_mbps, link.down_mbps)
        )
    else:
        slowness = (rng.permutation(count) + 0.5) / count
        rtt = _at_share(link.rtt_ms, slowness)
        up, down = (_at_share(values, 1 - slowness) for values in (link.up_mbps, link.down_mbps))
    return LinkDraws(rtt=rtt, up=up * link.efficiency, down=down * link.efficiency)


def draw_evenly(samples: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw numbers below `samples` [count], each as often as any other, in random order."""
    return rng.permutation(np.arange(count) % samples)


def _at_share(values: Sequence[float], share: Values) -> Values:
    """Return the values with such a share of the others below them."""
    places = np.minimum(share * len(values), len(values) - 1).astype(np.int64)
    return np.sort(values)[places]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Milliseconds of the parts of a request on the network, each [draws]."""

    up: Values
    rtt: Values
    down: Values

    @property
    def total(self) -> Values:
        """The sum of the parts."""
        return self.up + self.rtt + self.down


def draw_exchange(
    link: LinkState,
    drawn: LinkDraws,
    sent: Values,
    received: Values,
    rng: np.random.Generator,
) -> Exchange:
    """Draw the time that requests take on the network.

    Args:
        link: the link.
        drawn: its round trip and bandwidths at the moment of each request, see `draw_link`.
        sent: bytes of each request's body [draws]; those of the HTTP head are added here.
        received: bytes of each response's body [draws].
        rng: random generator of losses.
    """
    rtt, up, down = drawn.rtt, drawn.up, drawn.down
    max_window = math.inf if link.loss == 0 else max(2.0, math.sqrt(1.5 / link.loss))
    both = (
        transfer_ms(sent, up, rtt, head=HTTP_UP, window=link.window, max_window=max_window),
        transfer_ms(received, down, rtt, head=HTTP_DOWN, window=link.window, max_window=max_window),
    )
    if link.loss > 0:
        lost = [_recovery_ms(_segments(body), rtt, link.loss, rng) for body in (sent, received)]
        both = both[0] + lost[0], both[1] + lost[1]
    return Exchange(up=both[0], rtt=rtt + link.http_ms, down=both[1])


def transfer_ms(
    body: Values, mbps: Values, rtt: Values, *, head: int, window: int, max_window: float = math.inf
) -> Values:
    """Return the milliseconds beyond the round trip to transfer a message without loss [draws].

    Args:
        body, head: bytes.
        mbps: 10^6 bits per second.
        rtt: milliseconds.
        window: segments at the beginning.
        max_window: segments beyond which the window does not grow.
    """
    time: Values = 8e-3 * (body + head) / mbps
    return time + slow_start_ms(_segments(body), mbps, rtt, window, max_window)


def slow_start_ms(
    segments: Values,
    mbps: Values,
    rtt: Values,
    window: int = FIRST_WINDOW,
    max_window: float = math.inf,
) -> Values:
    """Return the milliseconds that a sender waits for its window to grow; all arrays [draws].

    Args:
        segments: number to send.
        mbps: 10^6 bits per second.
        rtt: milliseconds.
        window, max_window: segments at the beginning, and beyond which the window does not grow.
    """
    left, allowed = segments.astype(np.float64), min(float(window), max_window)
    waited = np.zeros_like(left)
    while (left > allowed).any():
        waits = np.maximum(0.0, rtt - 8e-3 * allowed * SEGMENT / mbps)
        waited += np.where(left > allowed, waits, 0.0)
        left = left - allowed
        allowed = min(2 * allowed, max_window)
    return waited


def _segments(body: Values) -> Values:
    """Return the segments of a message; the head takes one of its own."""
    return 1 + np.ceil(body / SEGMENT)


def _recovery_ms(segments: Values, rtt: Values, loss: float, rng: np.random.Generator) -> Values:
    count = len(rtt)
    before = rng.random(count) < 1 - (1 - loss) ** (segments - 1)
    last = rng.random(count) < loss
    timer = 2 * rtt + _PROBE_MS + np.where(rng.random(count) < 0.5, _LONE_MS, 0.0)
    return np.where(before, 1.25 * rtt, 0.0) + np.where(last, timer, 0.0)
