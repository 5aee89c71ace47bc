import dataclasses

import numpy as np
import pytest

from edgeclip.runtime.device.link import load_link
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import Objective, choose_plan, estimate_plans
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import (
    PlanConditions,
    embedding_bytes,
    estimate_plan,
)
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.plan import list_candidates
from edgeclip.runtime.planning.stage_times import StageTimes
from tests.runtime.planning.made_up_times import (
    CODEC_MS,
    FAST,
    HEAD_MS,
    PREPARE_MS,
    SLOW,
    chosen,
    estimates,
    made_up,
)


def test_all_kinds_of_plans_are_there(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    found = estimates(emoji_cuts, emoji_times, FAST)
    assert {item.plan.kind for item in found.values()} == {"device", "image", "cut"}
    assert {item.plan.cut for item in found.values()} == {None, *range(10)}
    assert found["send the file as it is"].plan.model == "emoji-student-image"
    assert found["cut 3 (after block 0), int8"].plan.model == "emoji-student-tail-3"
    searches = estimates(emoji_cuts, emoji_times, FAST, goal="search")
    assert searches["send the embedding"].plan.kind == "embedding"


def test_parts_are_those_of_the_formula(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    found = estimates(emoji_cuts, emoji_times, SLOW, slower=3.0, load=2.0)
    item = found["cut 5 (after block 1), int8"]
    size = np.median([p.bytes for p in emoji_times.payloads if (p.cut, p.codec) == (5, "int8")])
    assert item.parts.device == pytest.approx(3 * 2 * (PREPARE_MS + 5 * HEAD_MS))
    assert item.parts.encode == pytest.approx(3 * 2 * CODEC_MS)
    assert item.parts.up == pytest.approx(8e-3 * (size + 330) / 0.1, rel=0.02)
    assert item.parts.rtt == 200.0
    assert item.parts.server == pytest.approx(5 * HEAD_MS)
    assert item.parts.down == pytest.approx(8e-3 * (embedding_bytes(256)[1] + 190) / 0.1)
    assert item.parts.total == pytest.approx(item.plan.p50_ms, rel=0.01)
    alone = found["device only"]
    assert alone.parts.total == pytest.approx(3 * 2 * (PREPARE_MS + 10 * HEAD_MS))
    assert (alone.parts.rtt, alone.plan.bytes_p95) == (0.0, 0)


def test_percentiles_follow_the_samples(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    rare = tuple([1.0] * 11 + [31.0])  # one in twelve is slow
    stages = tuple(
        dataclasses.replace(item, ms=rare if item.stage.kind == "tail" else (0.5,) * 12)
        for item in emoji_times.stages
    )
    server = dataclasses.replace(emoji_times, stages=stages)
    device = made_up(emoji_times)
    (candidate,) = (
        item
        for item in list_candidates(emoji_cuts.manifest, device)
        if item.plan.name == "send the file as it is"
    )
    item = estimate_plan(candidate, device, server, PlanConditions(link=FAST, dim=256))
    assert item.plan.p50_ms is not None
    assert item.p95_ms - item.plan.p50_ms == pytest.approx(30, abs=0.1)


def test_queue_waits_longer_for_a_busy_server(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    name = "send the file as it is"
    idle = estimates(emoji_cuts, emoji_times, FAST)[name]
    busy = estimates(emoji_cuts, emoji_times, FAST, utilisation=0.5)[name]
    assert idle.parts.queue == 0
    # Constant service times S: the mean wait is rho S / (2 (1 - rho)).
    assert busy.parts.queue == pytest.approx(0.5 * busy.server_ms / (2 * 0.5), rel=0.15)


def test_slow_device_on_a_fast_link_sends_the_picture(
    emoji_cuts: CutSet, emoji_times: StageTimes
) -> None:
    choice = chosen(estimates(emoji_cuts, emoji_times, FAST, slower=20.0))
    assert choice.best.plan.kind == "image"


def test_slow_link_leaves_all_to_the_device(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    choice = chosen(estimates(emoji_cuts, emoji_times, SLOW))
    assert choice.best.plan.kind == "device"


def test_narrow_late_cut_wins_where_it_should(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    # The device is as fast as the server until its last block, which takes it a second.
    device = made_up(emoji_times)
    stages = tuple(
        dataclasses.replace(item, ms=(1000.0,) * 12)
        if str(item.stage) in ("tail 0", "head 9") or item.stage.kind == "compress"
        else item
        for item in device.stages
    )
    device = dataclasses.replace(device, stages=stages)
    link = LinkState(name="thin", rtt_ms=(5.0,), up_mbps=(1.0,), down_mbps=(10.0,))
    conditions = PlanConditions(link=link, dim=256, draws=500)
    found = estimate_plans(emoji_cuts.manifest, device, made_up(emoji_times), conditions)
    choice = choose_plan(found, Objective())
    assert (choice.best.plan.kind, choice.best.plan.cut) == ("cut", 8)


def test_deadline_and_quality_bound_the_choice(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    found = estimates(emoji_cuts, emoji_times, FAST, slower=20.0)
    hopeless = chosen(found, deadline_ms=0.5)
    assert not hopeless.meets_deadline
    strict = chosen(found, least_cosine=0.9999)
    assert {item.plan.codec for item in strict.refused} >= {"jpeg-75", "webp-80"}
    assert all(item.cosine_least >= 0.9999 for item in strict.allowed)
    impossible = chosen(found, least_cosine=1.5, mean_cosine=1.5)
    assert impossible.best.plan.kind == "device"  # it sends nothing that could lose


def test_bytes_and_server_time_can_have_a_price(
    emoji_cuts: CutSet, emoji_times: StageTimes
) -> None:
    found = estimates(emoji_cuts, emoji_times, FAST, slower=20.0)
    assert chosen(found).best.plan.kind == "image"
    assert chosen(found, ms_per_megabyte=1e9).best.plan.kind == "device"
    assert chosen(found, ms_per_server_second=1e9).best.plan.kind == "device"


def test_energy_counts_only_where_it_was_measured(
    emoji_cuts: CutSet, emoji_times: StageTimes
) -> None:
    found = estimates(emoji_cuts, emoji_times, FAST, slower=20.0)
    objective = Objective(ms_per_joule=1e6)
    choice = choose_plan(list(found.values()), objective)
    assert choice.best.joules is None
    device = made_up(emoji_times)
    stages = tuple(dataclasses.replace(item, joules=1e-3 * item.ms[0]) for item in device.stages)
    metered = dataclasses.replace(device, stages=stages, energy_sensor="RAPL packages")
    (alone,) = (
        item for item in list_candidates(emoji_cuts.manifest, metered) if item.plan.kind == "device"
    )
    item = estimate_plan(alone, metered, device, PlanConditions(link=FAST, dim=256))
    assert item.joules == pytest.approx(1e-3 * (PREPARE_MS + 10 * HEAD_MS))


def test_same_seed_same_prediction(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    link = LinkState.from_profile(load_link("lte"))
    assert estimates(emoji_cuts, emoji_times, link) == estimates(emoji_cuts, emoji_times, link)


def test_times_of_another_tower_are_refused(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    other = dataclasses.replace(emoji_times, bundle="another")
    for device, server in ((other, emoji_times), (emoji_times, other)):
        with pytest.raises(InputError, match="measure the same cut set on both sides"):
            estimate_plans(emoji_cuts.manifest, device, server, PlanConditions(link=FAST, dim=256))
