"""Graphs in miniature, and TensorRT for RTX, which builds engines without a GPU."""

import pytest

from edgeclip.profiles.device import DeviceProfile, load_device
from edgeclip.runtime.engine_key import GraphSource
from edgeclip.runtime.tensorrt_library import TensorRtLibrary, open_library
from tests.runtime.tiny_graphs import TOKENS, image_content, source_of, text_content


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
