"""Estimate latency and bytes of a plan from measured samples, the link and the server's queue.

Device, network, wait and server are drawn independently of each other; the stages of one side are
those of one round, round trip and bandwidth those of one moment (`link_state.py`). The 95th
percentile is the upper order statistic that the next request keeps with that probability: of N
samples the ceil((N + 1) x 0.95)-th, as in split conformal prediction (`runtime/stats`). N is the
smallest number of samples of a part; below 19 it is the largest, and the level N / (N + 1).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, fields
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.link_state import (
    LinkState,
    draw_evenly,
    draw_exchange,
    draw_link,
)
from edgeclip.runtime.planning.plan import Goal, PlanCandidate, SplitPlan
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes
from edgeclip.runtime.stats.percentiles import conformal_level
from edgeclip.runtime.wire.messages import (
    BUNDLE,
    SPACE_ID,
    InferRequest,
    InferResponse,
    encode_request,
    encode_response,
)


def draw_waiting(service_ms: Values, utilisation: float, rng: np.random.Generator) -> Values:
    """Draw waiting times of an M/G/1 queue in milliseconds, one for each service time [N].

    That is one worker that serves requests one by one as they come, at random times (Poisson
    arrivals). Requests that come in bursts wait longer than that, those of a server with several
    workers or with batches shorter.

    The wait is a geometric number of residual service times (Pollaczek and Khinchine; Kleinrock,
    "Queueing Systems", volume 1, 1975, section 5.7): P(n) = (1 - rho) rho^n, each of them a
    uniform share of a service time drawn with a weight of its own length. Its mean is
    rho E[S^2] / (2 E[S] (1 - rho)).

    Args:
        service_ms: service time of each request [N]; other clients' requests are assumed to be
            alike.
        utilisation: rho, the share of time that the server is busy, 0 to below 1.
        rng: random generator.

    Raises:
        InputError: a utilisation out of bounds.
    """
    if not 0 <= utilisation < 1:
        raise InputError(
            f"a utilisation of {utilisation:g} is out of bounds: give 0 to below 1, where a server "
            "still keeps up"
        )
    count = len(service_ms)
    waits = np.zeros(count)
    total = service_ms.sum()
    if utilisation == 0 or total == 0:
        return waits
    ahead = rng.geometric(1 - utilisation, count) - 1
    lengths = rng.choice(service_ms, int(ahead.sum()), p=service_ms / total)
    residuals = lengths * rng.random(len(lengths))
    np.add.at(waits, np.repeat(np.arange(count), ahead), residuals)
    return waits


PERCENTILE = 0.95
_ROUNDING = 1e-9
_HITS_BYTES = 600  # of the answer to a search: ten keys and scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConditions:
    """Link, loads and goal for which plans are predicted.

    Attributes:
        link: the network.
        dim: length of an embedding.
        load: factor by which the device's own times are longer than measured.
        utilisation: share of time that the server is busy with others, 0 to below 1; tells the
            wait by `draw_waiting` where none was observed.
        waits_ms: observed waits at the server, in milliseconds; empty where there are none.
        goal: an "embedding" on the device, or the hits of a "search" on the server.
        seed, draws: random seed and number of draws of the prediction; a percentile rests on a few
            hundred draws at least.
    """

    link: LinkState
    dim: Annotated[int, Ge(1)]
    load: Annotated[float, Gt(0)] = 1.0
    utilisation: Annotated[float, Ge(0), Lt(1)] = 0.0
    waits_ms: tuple[Annotated[float, Ge(0)], ...] = ()
    goal: Goal = "embedding"
    seed: int = 0
    draws: Annotated[int, Ge(100)] = 20_000

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyParts:
    """Mean milliseconds of each part of a plan; they add up to its mean latency."""

    device: float = 0.0
    encode: float = 0.0
    up: float = 0.0
    rtt: float = 0.0
    queue: float = 0.0
    decode: float = 0.0
    server: float = 0.0
    down: float = 0.0

    @property
    def total(self) -> float:
        """The mean latency."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """The prediction of a plan.

    Attributes:
        plan: with its p50, p95 and bytes.
        parts: where the time goes.
        bytes_p50: median size of a request's body.
        cosine_mean, cosine_least: mean and least cosine with the embeddings of uncompressed
            pictures.
        joules: energy of the device, as far as its sensor covers it; None if not measured.
        samples: smallest number of measured samples of a part; what is assumed does not count.
    """

    plan: SplitPlan
    parts: LatencyParts
    bytes_p50: int
    cosine_mean: float
    cosine_least: float
    joules: float | None
    samples: int

    @property
    def p95_ms(self) -> float:
        """The plan's 95th percentile, of every prediction; at `p95_level` if that is less."""
        assert self.plan.p95_ms is not None
        return self.plan.p95_ms

    @property
    def p95_level(self) -> float:
        """Share of requests that keep `p95_ms`: 0.95, or less where there are too few samples."""
        return min(PERCENTILE, conformal_level(self.samples))

    @property
    def server_ms(self) -> float:
        """Mean milliseconds of work on the server."""
        return self.parts.decode + self.parts.server


def estimate_plan(
    candidate: PlanCandidate, device: StageTimes, server: StageTimes, conditions: PlanConditions
) -> PlanEstimate:
    """Predict the latency, bytes, exactness and energy of a plan.

    Raises:
        InputError: a stage that it needs was not measured.
    """
    rng, draws = np.random.default_rng(conditions.seed), conditions.draws
    # One round for all stages of a side: what slows one stage of a round slows all of them.
    here, there = (draw_evenly(side.rounds, draws, rng) for side in (device, server))
    parts = {
        "device": conditions.load * _sum(device, candidate.device, here),
        "encode": conditions.load * _sum(device, candidate.encode, here),
        "decode": _sum(server, candidate.decode, there),
        "server": _sum(server, candidate.server, there),
    }
    sizes = _sent(candidate, conditions)
    sent = sizes[here % device.pictures % len(sizes)]
    samples = [device.rounds] if candidate.device or candidate.encode else []
    if candidate.asks:
        parts["queue"] = _waits(parts["decode"] + parts["server"], conditions, rng)
        parts |= _network(candidate, sent, conditions, rng)
        samples += [server.rounds] if candidate.decode or candidate.server else []
        link, waits = conditions.link.moments, len(conditions.waits_ms)
        samples += [*([link] if link else []), *([waits] if waits else [])]
    cosines = (1.0,) if candidate.payload is None else candidate.payload.cosines
    total: Values = np.sum(list(parts.values()), axis=0)
    return PlanEstimate(
        plan=_with_prediction(candidate.plan, total, sent, min(samples)),
        parts=LatencyParts(**{name: float(np.mean(values)) for name, values in parts.items()}),
        bytes_p50=round(float(np.median(sent))),
        cosine_mean=float(np.mean(cosines)),
        cosine_least=min(cosines),
        joules=_joules(device, (*candidate.device, *candidate.encode)),
        samples=min(samples),
    )


def _waits(service: Values, conditions: PlanConditions, rng: np.random.Generator) -> Values:
    if not conditions.waits_ms:
        return draw_waiting(service, conditions.utilisation, rng)
    observed = np.array(conditions.waits_ms)
    return observed[draw_evenly(len(observed), len(service), rng)]


@functools.cache
def embedding_bytes(dim: int) -> tuple[int, int]:
    """Return the size of a request's body, and of a response's, with one embedding."""
    row, known = np.zeros((1, dim), np.float32), {SPACE_ID: "0" * 64, BUNDLE: "bundle"}
    request = InferRequest(model="index", inputs={"embeddings": row}, parameters=known)
    response = InferResponse(model="bundle-image", outputs={"image_embeds": row})
    return len(encode_request(request)[1]), len(encode_response(response)[1])


def _network(
    candidate: PlanCandidate, sent: Values, conditions: PlanConditions, rng: np.random.Generator
) -> dict[str, Values]:
    asked, answered = embedding_bytes(conditions.dim)
    asking, hits, embedding = (
        np.full(len(sent), float(size)) for size in (asked, _HITS_BYTES, answered)
    )
    received = hits if candidate.plan.kind == "embedding" else embedding
    drawn = draw_link(conditions.link, len(sent), rng)  # one moment for both exchanges
    exchanges = [draw_exchange(conditions.link, drawn, sent, received, rng)]
    if candidate.searches:
        exchanges.append(draw_exchange(conditions.link, drawn, asking, hits, rng))
    return {
        "up": np.sum([exchange.up for exchange in exchanges], axis=0),
        "rtt": np.sum([exchange.rtt for exchange in exchanges], axis=0),
        "down": np.sum([exchange.down for exchange in exchanges], axis=0),
    }


def _sent(candidate: PlanCandidate, conditions: PlanConditions) -> Values:
    """Return the size of the request's body for each picture [pictures], or for all [1]."""
    if candidate.payload is not None:
        return np.array(candidate.payload.bytes, np.float64)
    return np.array([float(embedding_bytes(conditions.dim)[0]) if candidate.asks else 0.0])


def _sum(times: StageTimes, stages: tuple[SplitStage, ...], rounds: NDArray[np.int64]) -> Values:
    found = np.zeros(len(rounds))
    for stage in stages:
        found += times.ms(stage)[rounds]
    return found


def _joules(device: StageTimes, stages: tuple[SplitStage, ...]) -> float | None:
    found = [item.joules for item in map(device.find, stages) if item is not None]
    known = [joules for joules in found if joules is not None]
    return sum(known) if len(known) == len(found) and device.energy_sensor else None


def _with_prediction(plan: SplitPlan, total: Values, sent: Values, samples: int) -> SplitPlan:
    return dataclasses.replace(
        plan,
        p50_ms=round(float(np.median(total)), 3),
        p95_ms=round(upper_percentile(total, samples), 3),
        bytes_p95=round(float(np.percentile(sent, 95))),
    )


def upper_percentile(draws: Values, samples: int) -> float:
    """Return the 95th percentile of draws [draws] from so few samples that the next one keeps.

    It is the ceil((samples + 1) x 0.95)-th of `samples` steps of the draws' distribution: of that
    of the samples themselves, where they alone were drawn from. With fewer than 19 samples it is
    the 95th percentile of the draws, which the next value keeps less often.
    """
    place = min(samples, math.ceil((samples + 1) * PERCENTILE - _ROUNDING))
    # In the middle of the step: the draws of a lone sample are all equal.
    share = max(PERCENTILE, (place - 0.5) / samples)
    return float(np.quantile(draws, share, method="inverted_cdf"))
