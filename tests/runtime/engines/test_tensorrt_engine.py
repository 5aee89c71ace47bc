"""TensorRT engines: shape ranges, accepted inputs, runs."""

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import GraphSource, sm
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_engine import (
    InputContract,
    TensorRtEngine,
    check_feeds,
    shape_range,
)
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, gpu_capability, open_library
from edgeclip.runtime.errors import EngineError
from tests.runtime.tiny_graphs import a_key

PIXELS = InputContract("pixels", np.dtype(np.uint8), (1, 8, 8, 3), (4, 8, 8, 3))
IDS = InputContract("input_ids", np.dtype(np.int64), (1, 1), (4, 24))


def test_images_vary_in_number_only() -> None:
    found = shape_range("pixels", (-1, 8, 8, 3), a_key())
    assert (found.least, found.best, found.most) == ((1, 8, 8, 3), (4, 8, 8, 3), (32, 8, 8, 3))


@pytest.mark.parametrize(("length", "best"), [(77, 16), (16, 16), (9, 9), (1, 1)])
def test_texts_vary_in_number_and_length(length: int, best: int) -> None:
    found = shape_range("input_ids", (-1, -1), a_key(text_length=length))
    assert (found.least, found.best, found.most) == ((1, 1), (4, best), (32, length))


def test_a_fixed_length_and_a_single_number_stay() -> None:
    assert shape_range("input_ids", (-1, 64), a_key(text_length=64)).least == (1, 64)
    assert shape_range("scale", (), a_key()).most == ()


def test_fixed_batch_must_be_the_devices() -> None:
    key = a_key(batch_min=4, batch_best=4, batch_max=4)
    assert shape_range("pixels", (4, 8, 8, 3), key).most == (4, 8, 8, 3)
    with pytest.raises(EngineError, match="batches of 4 only, and the device asks for 1 to 32"):
        shape_range("pixels", (4, 8, 8, 3), a_key())


@pytest.mark.parametrize("shape", [(-1, -1), (-1, 3, -1, -1), (-1, 8, 8, -1)])
def test_axis_of_unknown_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"'pixels' of the graph varies along axis \d"):
        shape_range("pixels", shape, a_key())


@given(
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64)),
    st.integers(1, 200),
)
def test_ranges_are_in_order(batches: tuple[int, int, int], length: int) -> None:
    low, best, high = sorted(batches)
    key = a_key(batch_min=low, batch_best=best, batch_max=high, text_length=length)
    found = shape_range("input_ids", (-1, -1), key)
    for least, middle, most in zip(found.least, found.best, found.most, strict=True):
        assert 1 <= least <= middle <= most


@given(st.integers(0, 6), st.integers(0, 30))
def test_feeds_inside_the_range_and_no_others(batch: int, length: int) -> None:
    feeds = {"input_ids": np.zeros((batch, length), np.int64)}
    if 1 <= batch <= 4 and 1 <= length <= 24:
        check_feeds((IDS,), feeds)
    else:
        with pytest.raises(EngineError, match=rf"be 1\.\.4 x 1\.\.24, got {batch} x {length}:"):
            check_feeds((IDS,), feeds)


@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        ({}, "takes 'pixels', but was given nothing"),
        ({"pixel_values": np.zeros((1, 8, 8, 3), np.uint8)}, "but was given 'pixel_values'"),
        ({"pixels": np.zeros((1, 8, 8, 3), np.float32)}, "must be uint8, got float32"),
        ({"pixels": np.zeros((1, 3, 8, 8), np.uint8)}, r"must be 1\.\.4 x 8 x 8 x 3, got 1 x 3"),
        ({"pixels": np.zeros((8, 8, 3), np.uint8)}, "got 8 x 8 x 3"),
        ({"pixels": np.uint8(1)}, "got a single number"),
    ],
)
def test_feeds_that_do_not_fit(feeds: dict[str, Any], expected: str) -> None:
    with pytest.raises(EngineError, match=expected):
        check_feeds((PIXELS,), {name: np.asarray(array) for name, array in feeds.items()})


def test_without_a_gpu_it_says_so(
    rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource
) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    content = build_engine(image_source, device=ada, library=rtx).engine
    with pytest.raises(EngineError, match=r"cudaError\w+\): .*NVIDIA"):
        TensorRtEngine(content, library=rtx, source="vision")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def here(request: pytest.FixtureRequest) -> tuple[TensorRtLibrary, DeviceProfile]:
    """A TensorRT that is installed, and this machine's GPU as a device that it builds for."""
    pytest.importorskip("cuda.bindings.runtime")
    module = pytest.importorskip(request.param.replace("-", "_"))
    major = int(module.__version__.split(".")[0])
    capability = gpu_capability()
    if request.param == "tensorrt-rtx" and not hasattr(
        module.ComputeCapability, sm(capability).upper()
    ):
        pytest.skip(f"TensorRT-RTX does not know compute capability {capability}")
    device = DeviceProfile(
        name="here",
        description="this machine's GPU",
        engine=request.param,
        precisions=("fp32", "fp16", "int8"),
        threads=1,
        memory_mb=1000,
        batch_best=4,
        batch_max=8,
        compute_capability=capability,
        tensorrt_major=major if request.param == "tensorrt" else None,
    )
    return open_library(device), device


def _on_cpu(source: GraphSource) -> OrtEngine:
    assert isinstance(source.content, bytes)
    path = Path(f"{source.name}.onnx")
    return OrtEngine(path, providers=("CPUExecutionProvider",), threads=1, content=source.content)


@pytest.mark.gpu
def test_computes_what_the_graph_computes(
    here: tuple[TensorRtLibrary, DeviceProfile],
    image_source: GraphSource,
    text_source: GraphSource,
) -> None:
    library, device = here
    random = np.random.default_rng(0)
    for source, shapes in (
        (image_source, [(1, 8, 8, 3), (8, 8, 8, 3), (2, 8, 8, 3)]),
        (text_source, [(1, 1), (8, 24), (3, 7)]),
    ):
        built = build_engine(source, device=device, library=library)
        engine = TensorRtEngine(built.engine, library=library, source=source.name)
        assert engine.name == library.name
        for shape in shapes:
            most, dtype, name = (
                (256, np.uint8, "pixels") if source is image_source else (50, np.int64, "input_ids")
            )
            feeds: dict[str, NDArray[Any]] = {name: random.integers(0, most, shape, dtype=dtype)}
            (found,), (expected,) = engine.run(feeds).values(), _on_cpu(source).run(feeds).values()
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
def test_refuses_what_does_not_fit_and_goes_on(
    here: tuple[TensorRtLibrary, DeviceProfile], image_source: GraphSource
) -> None:
    library, device = here
    built = build_engine(image_source, device=device, library=library)
    engine = TensorRtEngine(built.engine, library=library, source="vision")
    with pytest.raises(EngineError, match=r"1\.\.8 x 8 x 8 x 3, got 9 x 8 x 8 x 3"):
        engine.run({"pixels": np.zeros((9, 8, 8, 3), np.uint8)})
    backwards = np.zeros((3, 8, 8, 3), np.uint8)[:, ::-1]
    assert engine.run({"pixels": backwards})["image_embeds"].shape == (3, 4)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.run({"pixels": backwards})


@pytest.mark.gpu
def test_bytes_that_are_no_engine(here: tuple[TensorRtLibrary, DeviceProfile]) -> None:
    library, _ = here
    with pytest.raises(EngineError, match=r"cannot load vision: .+"):
        TensorRtEngine(b"no engine" * 100, library=library, source="vision")


@pytest.mark.gpu
def test_compiled_kernels_are_kept(
    here: tuple[TensorRtLibrary, DeviceProfile], image_source: GraphSource, tmp_path: Path
) -> None:
    library, device = here
    if library.name == "tensorrt":
        pytest.skip("full TensorRT compiles when it builds, and has nothing to keep")
    built = build_engine(image_source, device=device, library=library)
    path = tmp_path / "vision.runtime-cache"
    feeds = {"pixels": np.zeros((1, 8, 8, 3), np.uint8)}
    for content in (None, b"not a cache", None):
        if content is not None:
            path.write_bytes(content)
        engine = TensorRtEngine(built.engine, library=library, source="vision", runtime_cache=path)
        engine.run(feeds)
        assert path.stat().st_size > 100
        del engine
        gc.collect()
