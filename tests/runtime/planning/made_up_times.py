"""Stage times that are easy to add up, in place of measured ones."""

import dataclasses
from typing import Any

from edgeclip.runtime.planning.choose_plan import Objective, PlanChoice, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions, PlanEstimate
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.stage_times import StageSamples, StageTimes

HEAD_MS, PREPARE_MS, CODEC_MS = 4.0, 2.0, 0.1  # of nine heads the k-th takes k times as long


def made_up(times: StageTimes, *, slower: float = 1.0) -> StageTimes:
    """The same stages with times that are easy to add up: the whole tower takes 40 ms."""

    def ms(item: StageSamples) -> float:
        stage = item.stage
        if stage.kind == "head":
            return HEAD_MS * (stage.cut or 0)
        if stage.kind == "tail":
            return 10 * HEAD_MS - HEAD_MS * (stage.cut or 0)
        return PREPARE_MS if stage.kind == "prepare" else CODEC_MS

    stages = tuple(
        dataclasses.replace(item, ms=(slower * ms(item),) * times.rounds, joules=None)
        for item in times.stages
    )
    return dataclasses.replace(times, stages=stages, contended=False)


FAST = LinkState(name="fast", rtt_ms=(0.1,), up_mbps=(10_000.0,), down_mbps=(10_000.0,))
SLOW = LinkState(name="slow", rtt_ms=(200.0,), up_mbps=(0.1,), down_mbps=(0.1,))


def estimates(
    cuts: CutSet, times: StageTimes, link: LinkState, *, slower: float = 1.0, **more: Any
) -> dict[str, PlanEstimate]:
    """All plans, with a device that is so many times slower than the server."""
    conditions = PlanConditions(link=link, dim=256, draws=500, **more)
    found = estimate_plans(cuts.manifest, made_up(times, slower=slower), made_up(times), conditions)
    return {item.plan.name: item for item in found}


def chosen(found: dict[str, PlanEstimate], **more: Any) -> PlanChoice:
    """The best of them by an objective of these fields."""
    return choose_plan(list(found.values()), Objective(**more))
