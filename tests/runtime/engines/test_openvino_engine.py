"""OpenVINO as an engine of its own, beside ONNX Runtime."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.device.machine import (
    detect_processor,
    has_bfloat16,
    has_int8_dot_products,
)
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import ConfigError, EngineError
from edgeclip.runtime.spec import Precision, Tower
from tests.runtime.conftest import EMOJI_BUNDLE
from tests.runtime.engines.test_onnxruntime_engine import rows_graph, write_rows

pytest.importorskip("openvino", reason="pip install 'edgeclip[openvino]'")
HAS_BFLOAT16 = has_bfloat16(detect_processor().flags)


@pytest.fixture
def device(cpu_device: DeviceProfile) -> DeviceProfile:
    return dataclasses.replace(cpu_device, name="intel", engine="openvino")


def pixels(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def golden_cosine(
    bundle: Bundle, tower: Tower, precision: Precision, device: DeviceProfile
) -> float:
    """The least cosine with what ONNX Runtime gave when the bundle was written."""
    golden = bundle.golden()
    (expected,) = (
        item.embeddings
        for item in golden.expected
        if (item.tower, item.precision) == (tower, precision)
    )
    encoder = Encoder(bundle, device, precision)
    if tower == "image":
        found = encoder.encode_pixels(golden.pixels)
    else:
        found = encoder.encode_text(golden.texts)
    return float(cosines(found, expected).min())


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_bundle_gives_its_golden_embeddings(
    tower: Tower, precision: Precision, device: DeviceProfile
) -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    if precision not in bundle.manifest.tower(tower).precisions:
        pytest.skip(f"the kept bundle has no {precision} {tower} tower")
    if precision == "int8" and not has_int8_dot_products(detect_processor().flags):
        pytest.skip("sums of 8-bit products saturate on this processor")
    exact = dataclasses.replace(device, precisions=("fp32", "fp16", "int8"), vnni=True)
    least = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.98}[precision]
    assert golden_cosine(bundle, tower, precision, exact) >= least


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16")
def test_bfloat16_is_near_and_not_the_same(device: DeviceProfile) -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    rounded = dataclasses.replace(device, bfloat16=True)
    assert 0.99 < golden_cosine(bundle, "image", "fp32", rounded) < 0.999999


@pytest.mark.skipif(HAS_BFLOAT16, reason="this processor has bfloat16")
def test_bfloat16_is_refused_without_it(device: DeviceProfile, tiny_bundle: Path) -> None:
    rounded = dataclasses.replace(device, bfloat16=True)
    with pytest.raises(EngineError, match="asks for bfloat16, which this processor lacks"):
        open_engine(tiny_bundle / "onnx" / "vision_model.onnx", device=rounded)


def test_bfloat16_is_for_this_engine_alone() -> None:
    with pytest.raises(ValueError, match="bfloat16 is for engine openvino only"):
        dataclasses.replace(load_device("this-machine"), bfloat16=True)


def test_batches_vary(tiny_bundle: Path, device: DeviceProfile, cpu_device: DeviceProfile) -> None:
    path = tiny_bundle / "onnx" / "vision_model.onnx"
    engine, other = open_engine(path, device=device), open_engine(path, device=cpu_device)
    assert engine.name == "openvino"
    for count in (1, 5, 2):
        feeds = {"pixel_values": pixels(count)}
        np.testing.assert_allclose(
            engine.run(feeds)["image_embeds"], other.run(feeds)["image_embeds"], atol=1e-5
        )


def test_what_was_returned_stays(tiny_bundle: Path, device: DeviceProfile) -> None:
    engine = open_engine(tiny_bundle / "onnx" / "vision_model.onnx", device=device)
    first = engine.run({"pixel_values": pixels(2)})["image_embeds"]
    before = first.copy()
    engine.run({"pixel_values": -pixels(2)})
    np.testing.assert_array_equal(first, before)


def test_threads_may_run_it_at_once(tiny_bundle: Path, device: DeviceProfile) -> None:
    engine = open_engine(tiny_bundle / "onnx" / "vision_model.onnx", device=device)
    batches = [pixels(count) for count in range(1, 9)] * 5
    alone = [engine.run({"pixel_values": batch})["image_embeds"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda batch: engine.run({"pixel_values": batch})["image_embeds"], batches)
        )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_content_is_loaded_in_place_of_the_file(
    tiny_bundle: Path, tmp_path: Path, device: DeviceProfile
) -> None:
    content = (tiny_bundle / "onnx" / "vision_model.onnx").read_bytes()
    engine = open_engine(tmp_path / "absent.onnx", device=device, content=content)
    assert set(engine.run({"pixel_values": pixels(2)})) == {"image_embeds"}


def test_data_files_are_read_from_beside_the_graph(tmp_path: Path, device: DeviceProfile) -> None:
    write_rows(tmp_path, 7)
    path, content = tmp_path / "rows.onnx", rows_graph("rows.bin")
    path.write_bytes(content)
    engine = open_engine(path, device=device, content=content, data_folder=tmp_path)
    np.testing.assert_array_equal(engine.run({"row": np.array([3])})["found"], [[7, 7]])
    with pytest.raises(EngineError, match="openvino cannot load"):
        open_engine(path, device=device, content=content)


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_what_is_no_graph_is_refused_in_one_line(
    content: bytes, tmp_path: Path, device: DeviceProfile
) -> None:
    with pytest.raises(EngineError, match=r"openvino cannot load .*absent\.onnx: ") as caught:
        open_engine(tmp_path / "absent.onnx", device=device, content=content)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit(tiny_bundle: Path, device: DeviceProfile) -> None:
    engine = open_engine(tiny_bundle / "onnx" / "vision_model.onnx", device=device)
    for feeds in ({"other": pixels(1)}, {"pixel_values": pixels(1)[:, :, :4]}):
        with pytest.raises(EngineError, match=r"openvino failed on .*vision_model") as caught:
            engine.run(feeds)
        assert "\n" not in str(caught.value)


def test_a_profile_names_it(tmp_path: Path) -> None:
    lines = ["name: nuc", "description: d", "engine: openvino", "precisions: [fp32]"]
    lines += ["threads: 2", "memory_mb: 8000", "bfloat16: true"]
    (tmp_path / "nuc.yaml").write_text("\n".join(lines))
    device = load_device(tmp_path / "nuc.yaml")
    assert device.on_cpu
    assert device.bfloat16
    (tmp_path / "nuc.yaml").write_text("\n".join(lines).replace("openvino", "onnxruntime-cpu"))
    with pytest.raises(ConfigError, match="bfloat16 is for engine openvino"):
        load_device(tmp_path / "nuc.yaml")
