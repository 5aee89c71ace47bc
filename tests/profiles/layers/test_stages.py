"""The tiny bundle behind a real server, and the built-in one cut in two."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.profiles.layers.stages import StageReport, measure_split_stages, measure_stages
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs import images, preprocess
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.split.http_client import Server, Transfer
from edgeclip.runtime.split.split_runtime import SplitRuntime
from edgeclip.runtime.towers import tower_runner
from edgeclip.runtime.towers.tower_runner import TowerRunner
from edgeclip.runtime.wire.messages import SPACE_ID, InferRequest, InferResponse
from tests.runtime.serving.models_of_bundle import AMPLE_MS, RULES, plan
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, serving


@pytest.fixture
def photo(photos: Path) -> Path:
    return photos / "red.png"


class Clock:
    """Seconds that pass when a function is called that was told to take some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._patch = monkeypatch

    def __call__(self) -> float:
        return self.now

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        """From now on the function takes so long, and still does its work."""
        real: Callable[..., Any] = getattr(owner, name)

        def slowed(*given: Any, **named: Any) -> Any:
            self.now += seconds
            return real(*given, **named)

        self._patch.setattr(owner, name, slowed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _ms(report: StageReport) -> dict[str, float]:
    return {stage.name: stage.ms.value for stage in report.stages}


def test_stages_of_a_picture_add_up(encoder: Encoder, photo: Path, clock: Clock) -> None:
    clock.slow(images, "_open_and_decode", 0.004)
    clock.slow(preprocess, "_resized", 0.002)
    clock.slow(tower_runner, "tower_feed", 0.0005)
    clock.slow(OrtEngine, "run", 0.010)
    clock.slow(TowerRunner, "_check", 0.001)
    report = measure_stages(encoder, [photo], runs=3, warm_up=1, clock=clock)
    assert list(_ms(report)) == ["read", "decode", "resize", "copy", "run", "post"]
    assert list(_ms(report).values()) == pytest.approx([0, 4, 2, 0.5, 10, 1])
    assert report.whole_ms.value == pytest.approx(17.5)
    assert report.unexplained_ms.value == pytest.approx(0)


def test_what_no_stage_holds_is_not_explained(encoder: Encoder, photo: Path, clock: Clock) -> None:
    clock.slow(OrtEngine, "run", 0.010)
    clock.slow(Encoder, "_joined", 0.005)
    report = measure_stages(encoder, [photo], runs=3, clock=clock)
    assert report.whole_ms.value == pytest.approx(15)
    assert report.unexplained_ms.value == pytest.approx(5)


def test_stages_of_a_text_add_up(encoder: Encoder, clock: Clock) -> None:
    clock.slow(TextTokenizer, "encode", 0.003)
    clock.slow(OrtEngine, "run", 0.010)
    clock.slow(TowerRunner, "_check", 0.001)
    report = measure_stages(encoder, ["a red apple", "the sea"], runs=4, clock=clock)
    assert list(_ms(report)) == ["tokenize", "copy", "run", "post"]
    assert list(_ms(report).values()) == pytest.approx([3, 0, 10, 1])
    assert report.unexplained_ms.value == pytest.approx(0)


def test_warm_up_is_not_counted(encoder: Encoder, photo: Path, clock: Clock) -> None:
    slow = iter([1.0] * 4)  # two rounds, both ways

    def warming(feeds: Any) -> Any:
        clock.now += next(slow, 0.010)
        return run(feeds)

    encoder.encode_image([photo])
    engine: Any = encoder._image_tower._engine
    run, engine.run = engine.run, warming
    report = measure_stages(encoder, [photo], runs=1, warm_up=2, clock=clock)
    assert report.whole_ms.value == pytest.approx(10)
    assert _ms(report)["run"] == pytest.approx(10)


def test_bytes_of_a_file_need_no_reading(encoder: Encoder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    stages = measure_stages(encoder, [file.getvalue()], runs=3).stages
    assert [stage.name for stage in stages] == ["decode", "resize", "copy", "run", "post"]
    assert all(stage.ms.value > 0 for stage in stages)


def test_the_encoder_is_left_as_it_was(encoder: Encoder, photo: Path, tmp_path: Path) -> None:
    before = encoder.encode_image([photo])
    engine = encoder._image_tower._engine
    measure_stages(encoder, [photo], runs=2)
    assert encoder._image_tower._engine is engine
    np.testing.assert_array_equal(encoder.encode_image([photo]), before)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="not an image"):
        measure_stages(encoder, [tmp_path / "broken.png"], runs=2)
    assert encoder._image_tower._engine is engine


def test_what_cannot_be_measured(encoder: Encoder, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one image file or text"):
        measure_stages(encoder, [])
    with pytest.raises(InputError, match="and one run"):
        measure_stages(encoder, [photo], runs=0)
    for other in ("a text", photo.read_bytes()):
        with pytest.raises(InputError, match="one kind of input"):
            measure_stages(encoder, [photo, other])
    with pytest.raises(InputError, match=r"none\.png"):
        measure_stages(encoder, [tmp_path / "none.png"])


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
