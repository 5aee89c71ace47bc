"""A plan that follows the link to a server on this machine, whose answers are delayed."""

import dataclasses
import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.choose_plan import Objective
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.estimate import PlanConditions
from edgeclip.runtime.planning.link_state import LinkState
from edgeclip.runtime.planning.replanning import AdaptivePlan
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.serving.bundle_models import ImageModel, tail_models
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.split_runtime import SplitRuntime
from tests.runtime.conftest import EMOJI_BUNDLE
from tests.runtime.planning.made_up_times import made_up
from tests.runtime.serving.models_of_bundle import AMPLE_MS, RULES, answer_by
from tests.runtime.split.raw_server import Behaviour, Call, RawServer, good, hang, serving

pytestmark = pytest.mark.slow

PATIENCE = 30.0  # seconds
GOOD_LINK = LinkState(name="good", rtt_ms=(2.0,), up_mbps=(100.0,), down_mbps=(100.0,))


def link(*, delay_s: float = 0.0, mbps: float = 1e6) -> Behaviour:
    """Answer as late as a link of that delay and bandwidth would let the server."""

    def behave(call: Call) -> None:
        call.server.stopped.wait(delay_s + 8e-6 * len(call.body) / mbps)
        call.send(call.good())

    return behave


@pytest.fixture(scope="module")
def encoder(cpu_device: DeviceProfile) -> Encoder:
    return Encoder(Bundle.open(EMOJI_BUNDLE), cpu_device)


@pytest.fixture
def raw(encoder: Encoder, emoji_cuts: CutSet) -> Iterator[RawServer]:
    image = ImageModel(encoder, "emoji-student-image")
    tails = {tail.name: tail for tail in tail_models(emoji_cuts, encoder.device)}
    with serving(RawServer(answer=answer_by({image.name: image, **tails}))) as server:
        yield server


@pytest.fixture
def server(raw: RawServer) -> Iterator[Server]:
    with Server(raw.url, rules=RULES) as server:
        yield server


@pytest.fixture
def adaptive(emoji_cuts: CutSet, emoji_times: StageTimes) -> AdaptivePlan:
    """The server takes 40 ms for a picture, the device 200 ms."""
    return AdaptivePlan(
        emoji_cuts.manifest,
        dataclasses.replace(made_up(emoji_times, slower=5.0), device="slow"),
        made_up(emoji_times),
        PlanConditions(link=GOOD_LINK, dim=256),
        Objective(),
        dwell_s=0.3,
        review_s=0.05,
        max_age_s=1.5,
    )


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A JPEG file of some 60 kB, which is sent as it is."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "JPEG", quality=95)
    return written.getvalue()


def call_until(runtime: SplitRuntime, photo: bytes, condition: Callable[[], bool]) -> None:
    """Embed a picture again and again until it is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"still {runtime.plan.name}"
        assert runtime.encode_image(photo, deadline_ms=AMPLE_MS).degraded is None
        time.sleep(0.02)


@pytest.mark.parametrize("slow", [link(delay_s=0.6), link(mbps=0.03)], ids=["delay", "bandwidth"])
def test_the_plan_follows_the_link(
    encoder: Encoder,
    emoji_cuts: CutSet,
    raw: RawServer,
    server: Server,
    adaptive: AdaptivePlan,
    photo: bytes,
    slow: Behaviour,
) -> None:
    expected = encoder.encode_image(photo)
    with SplitRuntime(encoder, adaptive, server, cuts=emoji_cuts) as runtime:
        before = runtime.plan
        assert before.kind == "image"
        first = runtime.encode_image(photo, deadline_ms=AMPLE_MS)
        assert first.source == "server"
        np.testing.assert_allclose(first.value, expected, atol=0.1)
        raw.behave = slow
        call_until(runtime, photo, lambda: runtime.plan.name != before.name)
        asked = len(raw.requests)
        if runtime.plan.kind == "device":
            found = runtime.encode_image(photo, deadline_ms=AMPLE_MS)
            assert (found.source, found.degraded) == ("device", None)
            assert len(raw.requests) == asked
        raw.behave = good
        call_until(runtime, photo, lambda: runtime.plan.name == before.name)
        assert runtime.encode_image(photo, deadline_ms=AMPLE_MS).source == "server"


def test_noise_changes_no_plan(
    encoder: Encoder,
    emoji_cuts: CutSet,
    raw: RawServer,
    server: Server,
    adaptive: AdaptivePlan,
    photo: bytes,
) -> None:
    with SplitRuntime(encoder, adaptive, server, cuts=emoji_cuts) as runtime:
        before = runtime.plan.name
        end = time.monotonic() + 1.5
        number = 0
        while time.monotonic() < end:
            raw.behave = link(delay_s=0.05 if number % 3 == 0 else 0.0)
            assert runtime.encode_image(photo, deadline_ms=AMPLE_MS).source == "server"
            assert runtime.plan.name == before
            number += 1


def test_requests_that_are_given_up_end_the_plan(
    encoder: Encoder,
    emoji_cuts: CutSet,
    raw: RawServer,
    server: Server,
    adaptive: AdaptivePlan,
    photo: bytes,
) -> None:
    raw.behave = hang
    with SplitRuntime(encoder, adaptive, server, cuts=emoji_cuts) as runtime:
        end = time.monotonic() + PATIENCE
        while runtime.plan.kind != "device":
            assert time.monotonic() < end
            reply = runtime.encode_image(photo, deadline_ms=700)
            assert reply.source == "device"


def test_an_adaptive_plan_needs_a_server_and_the_cut_set(
    encoder: Encoder, emoji_cuts: CutSet, server: Server, adaptive: AdaptivePlan
) -> None:
    with pytest.raises(InputError, match="needs the cut set"):
        SplitRuntime(encoder, adaptive, server)
    with pytest.raises(InputError, match="needs a server"):
        SplitRuntime(encoder, adaptive, cuts=emoji_cuts)
