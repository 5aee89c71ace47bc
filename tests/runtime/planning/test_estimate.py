import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.estimate import (
    PlanConditions,
    PlanEstimate,
    draw_waiting,
    embedding_bytes,
    estimate_plan,
    upper_percentile,
)
from edgeclip.runtime.planning.link_state import LinkDraws, LinkState, draw_exchange
from edgeclip.runtime.planning.plan import PlanCandidate, SplitPlan
from edgeclip.runtime.planning.stage_times import Payload, SplitStage, StageSamples, StageTimes

MACHINE = Machine(
    cpu="CPU",
    cores=2,
    flags=(),
    memory_mb=8000,
    os="Linux",
    python="CPython 3.11",
    packages=(),
)
COMPRESS = SplitStage(kind="compress", codec="file")
WHOLE = SplitStage(kind="tail", cut=0)
SENT = 20_000  # bytes
PLAN = PlanCandidate(
    plan=SplitPlan(name="send", kind="image", space="0" * 64, model="m-image", codec="file"),
    encode=(COMPRESS,),
    server=(WHOLE,),
    payload=Payload(cut=None, codec="file", bytes=(SENT,), cosines=(1.0,)),
)


def times(stage: SplitStage, ms: NDArray[np.float64]) -> StageTimes:
    """One stage of one side, measured in so many rounds."""
    return StageTimes(
        created="2026-11-30T12:00:00+00:00",
        command="typed",
        machine=MACHINE,
        device="board",
        bundle="m",
        space="0" * 64,
        precision="fp32",
        rounds=len(ms),
        pictures=1,
        stages=(StageSamples(stage=stage, ms=tuple(ms.tolist())),),
        payloads=(),
        waiting_share=None,
        steal_share=None,
        contended=False,
    )


def estimate(
    device: NDArray[np.float64],
    server: NDArray[np.float64],
    link: LinkState,
    *,
    waits_ms: tuple[float, ...] = (),
    seed: int = 0,
) -> PlanEstimate:
    conditions = PlanConditions(link=link, dim=8, draws=2000, seed=seed, waits_ms=waits_ms)
    return estimate_plan(PLAN, times(COMPRESS, device), times(WHOLE, server), conditions)


STEADY = LinkState(name="steady", rtt_ms=(10.0,), up_mbps=(10.0,), down_mbps=(10.0,))


def simulated(service: NDArray[np.float64], utilisation: float, seed: int) -> NDArray[np.float64]:
    """Waits in a queue with Poisson arrivals, by Lindley's recursion."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(service.mean() / utilisation, len(service))
    waits = np.zeros(len(service))
    for i in range(1, len(service)):
        waits[i] = max(0.0, waits[i - 1] + service[i - 1] - gaps[i])
    return waits


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_as_a_simulated_queue(utilisation: float) -> None:
    rng = np.random.default_rng(1)
    service = rng.gamma(2.0, 3.0, 200_000)
    drawn = draw_waiting(service, utilisation, rng)
    expected = simulated(service, utilisation, 2)
    formula = utilisation * (service**2).mean() / (2 * service.mean() * (1 - utilisation))
    assert drawn.mean() == pytest.approx(formula, rel=0.03)
    assert np.percentile(drawn, 95) == pytest.approx(np.percentile(expected, 95), rel=0.08)
    assert (drawn == 0).mean() == pytest.approx(1 - utilisation, abs=0.01)


def test_nobody_waits_for_an_idle_server() -> None:
    assert not draw_waiting(np.ones(100), 0.0, np.random.default_rng(0)).any()
    assert not draw_waiting(np.zeros(100), 0.5, np.random.default_rng(0)).any()


@pytest.mark.parametrize("utilisation", [1.0, -0.1, float("nan")])
def test_server_that_cannot_keep_up_is_refused(utilisation: float) -> None:
    with pytest.raises(InputError, match="utilisation"):
        draw_waiting(np.ones(10), utilisation, np.random.default_rng(0))


def test_observed_waits_are_drawn_in_place_of_a_queue() -> None:
    waits = tuple([0.0] * 15 + [40.0] * 5)
    found = estimate(np.ones(40), np.ones(40), STEADY, waits_ms=waits)
    assert found.parts.queue == pytest.approx(10.0)
    assert found.samples == 20
    assert found.p95_ms - (found.plan.p50_ms or 0.0) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("samples", "place"), [(5, 5), (18, 18), (19, 19), (20, 20), (39, 38), (100, 96), (1000, 951)]
)
def test_the_percentile_is_the_order_statistic_that_the_next_value_keeps(
    samples: int, place: int
) -> None:
    values = np.arange(1.0, samples + 1)
    assert upper_percentile(values, samples) == place
    assert upper_percentile(np.resize(values, 7 * samples), samples) == place


def test_too_few_rounds_have_a_lower_level() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.gamma(4.0, 1.0, 12), rng.gamma(4.0, 1.0, 50)
    found = estimate(few, many, STEADY)
    assert (found.samples, found.p95_level) == (12, 12 / 13)
    assert estimate(many, many, STEADY).p95_level == 0.95
    alone = PlanCandidate(
        plan=SplitPlan(name="device only", kind="device", space="0" * 64),
        device=(COMPRESS,),
        asks=False,
    )
    conditions = PlanConditions(link=STEADY, dim=8)
    item = estimate_plan(alone, times(COMPRESS, few), times(WHOLE, many), conditions)
    assert item.p95_ms == pytest.approx(few.max(), abs=1e-3)


@pytest.mark.slow
def test_the_percentile_is_kept_where_round_trip_and_bandwidth_move_together() -> None:
    """1,000 links of 60 observed moments each; independent draws are late too often."""
    repeats, rng = 1000, np.random.default_rng(0)
    kept = {"pairs": 0.0, "shuffled": 0.0}
    bounds = dict(kept)
    unseen = 200  # requests after the prediction
    for number in range(repeats):
        busy = rng.normal(0, 1, 60 + unseen)
        rtt = 40 * np.exp(0.6 * busy + rng.normal(0, 0.1, len(busy)))
        mbps = 2 * np.exp(-0.6 * busy + rng.normal(0, 0.1, len(busy)))
        device, server = rng.gamma(20.0, 0.25, (2, len(busy)))
        for name, order in (("pairs", np.arange(60)), ("shuffled", rng.permutation(60))):
            link = LinkState(
                name=name,
                rtt_ms=tuple(rtt[:60].tolist()),
                up_mbps=tuple(mbps[:60][order].tolist()),
                down_mbps=(50.0,),
                moments=60,
            )
            bound = estimate(device[:60], server[:60], link, seed=number).p95_ms
            took = device[60:] + server[60:] + network_ms(rtt[60:], mbps[60:])
            kept[name] += float(np.mean(took <= bound)) / repeats
            bounds[name] += bound / repeats
    assert 0.948 < kept["pairs"] < 0.958  # 58 of 61
    assert kept["shuffled"] < 0.94
    assert bounds["shuffled"] < 0.95 * bounds["pairs"]


def network_ms(rtt: NDArray[np.float64], mbps: NDArray[np.float64]) -> NDArray[np.float64]:
    drawn = LinkDraws(rtt=rtt, up=mbps, down=np.full(len(rtt), 50.0))
    sent, received = (np.full(len(rtt), float(size)) for size in (SENT, embedding_bytes(8)[1]))
    return draw_exchange(STEADY, drawn, sent, received, np.random.default_rng(0)).total
