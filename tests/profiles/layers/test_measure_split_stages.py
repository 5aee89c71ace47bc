"""The tiny bundle behind a real server, and the built-in one cut in two."""

from pathlib import Path

import pytest

from edgeclip.profiles.layers.stages import measure_split_stages
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.split.http_client import Server, Transfer
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.wire.messages import SPACE_ID, InferRequest, InferResponse
from tests.runtime.serving.models_of_bundle import AMPLE_MS, RULES, plan
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, serving


def test_a_picture_that_is_sent(encoder: Encoder, raw: RawServer, photos: Path) -> None:
    pictures, log = sorted(photos.glob("*.png")), list[Transfer]()
    with Server(raw.url, rules=RULES, watch=log.append) as server:
        runtime = SplitRuntime(encoder, plan(), server)
        stages = measure_split_stages(runtime, log, pictures, runs=4, deadline_ms=AMPLE_MS)
    assert [stage.name for stage in stages] == ["read", "copy", "network"]
    assert all(stage.ms.value > 0 for stage in stages)
    assert len(raw.requests) == 5  # one round is not counted


def test_stages_add_up_to_the_whole(encoder: Encoder, raw: RawServer, photos: Path) -> None:
    ticks = iter(range(1_000_000))
    log = list[Transfer]()
    with Server(raw.url, rules=RULES, watch=log.append) as server:
        runtime = SplitRuntime(encoder, plan(), server)
        stages = measure_split_stages(
            runtime,
            log,
            [photos / "red.png"],
            runs=1,
            deadline_ms=AMPLE_MS,
            clock=lambda: float(next(ticks)),  # a second for whatever lies between two looks
        )
    found = {stage.name: stage.ms.value for stage in stages}
    assert found["read"] == 1000
    assert found["network"] == log[0].ms
    assert sum(found.values()) == pytest.approx(1000)


def test_a_plan_of_the_device_is_the_way_of_a_file(encoder: Encoder, photos: Path) -> None:
    runtime = SplitRuntime(encoder, plan("device"))
    stages = measure_split_stages(runtime, [], [photos / "red.png"], runs=2)
    assert [stage.name for stage in stages][:2] == ["read", "decode"]


def test_a_cut_tower(emoji_cuts: CutSet, cpu_device: DeviceProfile, photos: Path) -> None:
    number = emoji_cuts.numbers[1]
    bundle = Path(__file__).parents[3] / "export" / "emoji_bundle"
    encoder = Encoder(Bundle.open(bundle), cpu_device)
    tail = CutTail(emoji_cuts, number, cpu_device)

    def answer(request: InferRequest) -> InferResponse:
        outputs = tail.run(request.inputs, request.parameters)
        space = {SPACE_ID: encoder.space}
        return InferResponse(model=request.model, outputs=outputs, parameters=space)

    log = list[Transfer]()
    cut = plan("cut", model=tail.name, codec="fp16", cut=number, space=encoder.space)
    with (
        serving(RawServer(answer=answer)) as raw,
        Server(raw.url, rules=RULES, watch=log.append) as server,
    ):
        runtime = SplitRuntime(encoder, cut, server, cuts=emoji_cuts)
        stages = measure_split_stages(
            runtime, log, [photos / "red.png"], runs=3, deadline_ms=AMPLE_MS
        )
    assert [stage.name for stage in stages] == ["read", "decode", "resize", "run", "network"]


def test_a_server_that_does_not_answer(encoder: Encoder, raw: RawServer, photos: Path) -> None:
    log = list[Transfer]()
    with Server(raw.url, rules=RULES, watch=log.append) as server:
        runtime = SplitRuntime(encoder, plan(), server)
        raw.behave = raw_server.drop
        with pytest.raises(InputError, match=r"did not answer for .*red\.png \(unreachable\)"):
            measure_split_stages(runtime, log, [photos / "red.png"], runs=2)
        with pytest.raises(InputError, match="at least one image file"):
            measure_split_stages(runtime, log, [], runs=2)
