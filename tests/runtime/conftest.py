"""What tests of several parts of the runtime start from.

Graphs in miniature; TensorRT for RTX, which builds engines without a GPU; the built-in
bundle's image tower, cut everywhere and measured once; the tiny bundle, opened and served.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeclip.profiles.cuts.measure_cuts import measure_cuts
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.engine_records import GraphSource
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, open_library
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.stage_times import StageTimes
from edgeclip.runtime.split.http_client import Server
from tests.cut_sets import write_cut_set
from tests.runtime.serving.models_of_bundle import RULES, answer_by, models_of
from tests.runtime.split.raw_server import RawServer, serving
from tests.runtime.tiny_graphs import TOKENS, image_content, source_of, text_content

EMOJI_BUNDLE = Path(__file__).parents[2] / "export" / "emoji_bundle"


@dataclass
class Clock:
    """Seconds that pass only when a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Path, cpu_device: DeviceProfile) -> Encoder:
    """The tiny bundle with one thread."""
    return Encoder.open(tiny_bundle, device=cpu_device)


@pytest.fixture
def raw(encoder: Encoder, tmp_path: Path) -> Iterator[RawServer]:
    """A server that answers by its models, and can be told to misbehave."""
    with serving(RawServer(answer=answer_by(models_of(encoder, tmp_path)))) as server:
        yield server


@pytest.fixture
def server(raw: RawServer) -> Iterator[Server]:
    """That server, as its client sees it."""
    with Server(raw.url, rules=RULES) as server:
        yield server


@pytest.fixture(scope="session")
def image_source() -> GraphSource:
    """An image tower in miniature: pixels uint8 [n, 8, 8, 3] -> image_embeds [n, 4]."""
    return source_of("vision", image_content())


@pytest.fixture(scope="session")
def text_source() -> GraphSource:
    """A text tower in miniature: input_ids int64 [n, length] -> text_embeds [n, 4]."""
    return source_of("text", text_content(), TOKENS)


@pytest.fixture(scope="session")
def ada() -> DeviceProfile:
    """A device with TensorRT for RTX."""
    return load_device("rtx-4000-ada")


@pytest.fixture(scope="session")
def rtx(ada: DeviceProfile) -> TensorRtLibrary:
    """TensorRT for RTX, where it is installed."""
    pytest.importorskip("tensorrt_rtx")
    return open_library(ada)


@pytest.fixture(scope="session")
def emoji_cuts(tmp_path_factory: pytest.TempPathFactory, cpu_device: DeviceProfile) -> CutSet:
    """A cut set with all cuts and five pictures; read it, do not alter it."""
    out = tmp_path_factory.mktemp("emoji") / "cuts"
    return write_cut_set(Bundle.open(EMOJI_BUNDLE), out, device=cpu_device, count=5)


@pytest.fixture(scope="session")
def emoji_times(emoji_cuts: CutSet, cpu_device: DeviceProfile) -> StageTimes:
    """What was measured of it."""
    return measure_cuts(emoji_cuts, device=cpu_device, command="pytest", rounds=12)
