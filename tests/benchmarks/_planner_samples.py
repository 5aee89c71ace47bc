"""Samples for the planner's benchmark, taken between its requests: the link and the stages."""

import dataclasses
import time
from collections.abc import Mapping

from _network import EFFICIENCY
from _planner_device import ONE_THREAD, Device, slower

from edgeclip.profiles.cuts.measure_cuts import StageBuilder, StageSampler, TimedStage
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate, estimate_plan
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.plan import PlanCandidate
from edgeclip.runtime.planning.replanning import LinkEstimator
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes

RTT_MS = 20.0
PAUSE_S = 0.25  # between requests: longer than TCP's timeout, so that slow start begins anew
SMALL, LARGE = 100, 12_000  # bytes of a probe

_ECHO_JSON, _ECHO_REPLY = 256, 192  # bytes of a probe's JSON, and of its reply


class Probe:
    """What requests that compute nothing tell of the link."""

    def __init__(self, device: Device, mbps: float) -> None:
        self._device = device
        assumed = LinkState(
            name=f"{mbps:g} Mbit/s",
            rtt_ms=(RTT_MS,),
            up_mbps=(mbps,),
            down_mbps=(mbps,),
            efficiency=EFFICIENCY,
        )
        self._estimator = LinkEstimator(assumed, max_age_s=3600)
        device.echo(SMALL)  # makes the connection

    def send(self, size: int) -> None:
        """Send one request of that many bytes, after a pause that lets TCP begin anew."""
        time.sleep(PAUSE_S if size > SMALL else 0.0)
        took = self._device.echo(size)
        self._estimator.observe(sent=size + _ECHO_JSON, received=_ECHO_REPLY, network_ms=took)

    def state(self) -> LinkState:
        """The link so far."""
        return self._estimator.state()


class PlanSamples:
    """The stages of one plan, on both sides, each time that a request for it is due."""

    def __init__(
        self, candidate: PlanCandidate, works: Mapping[SplitStage, TimedStage], count: int
    ) -> None:
        self.candidate = candidate
        here = [slower(works[stage]) for stage in (*candidate.device, *candidate.encode)]
        there = [works[stage] for stage in (*candidate.decode, *candidate.server)]
        there = there or here  # the device alone asks no server
        self._here, self._there = StageSampler(here, count), StageSampler(there, count)
        self._rounds = 0
        self._here.warm_up()
        self._there.warm_up()

    def run_round(self) -> int:
        """Run each stage once; returns the number of the round, which is that of its picture."""
        self._here.run_round()
        self._there.run_round()
        self._rounds += 1
        return self._rounds - 1

    def predict(self, known: StageTimes, rounds: int, conditions: PlanConditions) -> PlanEstimate:
        """What the planner makes of them; `known` says all but the stages."""
        here, there = (
            dataclasses.replace(
                known,
                rounds=rounds,
                pictures=min(rounds, known.pictures),
                payloads=(),
                stages=tuple(side.samples()),
            )
            for side in (self._here, self._there)
        )
        payload = self.candidate.payload
        if payload is not None:
            payload = dataclasses.replace(
                payload, bytes=payload.bytes[:rounds], cosines=payload.cosines[:rounds]
            )
        candidate = dataclasses.replace(self.candidate, payload=payload)
        return estimate_plan(candidate, here, there, conditions)


def all_works(cuts: CutSet) -> dict[SplitStage, TimedStage]:
    """Every stage of a cut set, at the machine's own speed."""
    works = StageBuilder(cuts, ONE_THREAD, cuts.pictures)
    made = list(works.picture_stages())
    for point in cuts.manifest.points:
        made += works.cut_stages(point)[0]
    return {work.stage: work for work in made}
