"""The built-in bundle cut in two: its head here, its tail behind a server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import SpaceMismatchError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.wire.messages import CUT, SPACE_ID, InferRequest, InferResponse
from tests.cut_sets import write_cut_set
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, serving

BUNDLE = Path(__file__).parents[3] / "export" / "emoji_bundle"
CUT_NUMBER = 3
AMPLE_MS = 30_000.0


@pytest.fixture(scope="module")
def encoder(cpu_device: DeviceProfile) -> Encoder:
    return Encoder(Bundle.open(BUNDLE), cpu_device)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> CutSet:
    out = tmp_path_factory.mktemp("cuts") / "cuts"
    points = (0, CUT_NUMBER)
    return write_cut_set(encoder.bundle, out, device=encoder.device, points=points)


@pytest.fixture
def raw(cuts: CutSet, encoder: Encoder) -> Iterator[RawServer]:
    tails = [CutTail(cuts, number, encoder.device) for number in cuts.numbers]
    models = {tail.name: tail for tail in tails}

    def answer(request: InferRequest) -> InferResponse:
        outputs = models[request.model].run(request.inputs, request.parameters)
        space = {SPACE_ID: encoder.space}
        return InferResponse(model=request.model, outputs=outputs, parameters=space)

    with serving(RawServer(answer=answer)) as server:
        yield server


@pytest.fixture
def pixels(encoder: Encoder) -> np.ndarray:
    return encoder.bundle.golden().pixels[:2]


def plan(encoder: Encoder, number: int, codec: str) -> SplitPlan:
    return SplitPlan(
        name="test",
        kind="cut",
        space=encoder.space,
        model=f"{encoder.bundle.manifest.name}-tail-{number}",
        codec=codec,
        cut=number,
        deadline_ms=500,
    )


@pytest.mark.parametrize(
    ("number", "codec"), [(0, "uint8"), (CUT_NUMBER, "fp32"), (CUT_NUMBER, "int8-zstd")]
)
def test_two_halves_give_what_the_whole_would(
    encoder: Encoder, cuts: CutSet, raw: RawServer, pixels: np.ndarray, number: int, codec: str
) -> None:
    with Server(raw.url) as server:
        runtime = SplitRuntime(encoder, plan(encoder, number, codec), server, cuts=cuts)
        reply = runtime.encode_pixels(pixels, deadline_ms=AMPLE_MS)
    assert (reply.source, reply.degraded) == ("server", None)
    cosines = (reply.value * encoder.encode_pixels(pixels)).sum(axis=1)
    assert cosines.min() > (0.99 if codec == "int8-zstd" else 0.9999)
    assert raw.requests[0].parameters[CUT] == str(number)


def test_whole_tower_runs_here_without_the_server(
    encoder: Encoder, cuts: CutSet, raw: RawServer, pixels: np.ndarray
) -> None:
    raw.behave = raw_server.hang
    with Server(raw.url) as server:
        runtime = SplitRuntime(encoder, plan(encoder, CUT_NUMBER, "int8"), server, cuts=cuts)
        reply = runtime.encode_pixels(pixels)
    assert (reply.source, reply.degraded) == ("device", "deadline")
    np.testing.assert_array_equal(reply.value, encoder.encode_pixels(pixels))


def test_cut_set_of_another_space_is_refused(cuts: CutSet, tiny_bundle: Path) -> None:
    with Server("http://127.0.0.1:9") as server:
        tiny = Encoder.open(tiny_bundle)
        with pytest.raises(SpaceMismatchError, match="cut set"):
            SplitRuntime(tiny, plan(tiny, CUT_NUMBER, "int8"), server, cuts=cuts)
