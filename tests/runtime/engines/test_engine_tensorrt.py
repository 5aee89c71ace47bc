import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.bundle.engine_records import GraphSource, sm
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, gpu_capability, open_library
from edgeclip.runtime.errors import EngineError


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
