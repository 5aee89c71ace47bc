import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.profiles.measure.interleaved_runs import measure_interleaved
from edgeclip.profiles.measure.open_subject import (
    _provider,
    bundle_targets,
    open_subject,
    sample_pictures,
)
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.record.measurement import MeasurementRun, measurement_run
from edgeclip.runtime import encoder as encoder_module
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, EngineParityError, InputError
from edgeclip.runtime.towers.tower_runner import TowerRunner
from tests.conftest import QUICK
from tests.data_file import save_with_data

GRAPH = "onnx/vision_model.onnx"


def spec_of(bundle: Path, device: DeviceProfile, part: Any, **changes: Any) -> SubjectSpec:
    return SubjectSpec(name="it", part=part, device=device, bundle=str(bundle), **changes)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_tower_runs_golden_inputs(
    tiny_bundle: Path, cpu_device: DeviceProfile, tower: Any, precision: Any
) -> None:
    bundle = Bundle.open(tiny_bundle)
    golden = bundle.golden()
    (expected,) = (
        item.embeddings
        for item in golden.expected
        if (item.tower, item.precision) == (tower, precision)
    )
    with open_subject(spec_of(tiny_bundle, cpu_device, tower, precision=precision)) as subject:
        batch = subject.target.make_batch(len(expected) + 1)
        found = np.asarray(subject.target.run(batch))
    np.testing.assert_allclose(found[:-1], expected, atol=1e-6)
    assert (subject.target.name, subject.target.threads) == (f"{tower} it", 1)
    identity = subject.identity
    assert (identity.bundle, identity.precision) == ("tiny", precision)
    assert identity.sha256 == sha256_file(tiny_bundle / "edgeclip.json")
    assert (identity.engine, identity.provider) == ("onnxruntime-cpu", "CPUExecutionProvider")
    assert identity.bytes_on_disk == bundle.tower_path(tower, precision).stat().st_size
    assert identity.input_shape == (1, *golden.inputs(tower).shape[1:])
    assert subject.remarks() == ()


def test_the_session_says_what_computes(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    runner = TowerRunner(Bundle.open(tiny_bundle), "image", "fp32", cpu_device)
    for fallback in (False, True):
        # Whatever the device asks for, here after the session was made.
        runner.device = dataclasses.replace(
            cpu_device, engine="onnxruntime-openvino", cpu_fallback=fallback
        )
        assert _provider(runner) == "CPUExecutionProvider"


def test_by_default_it_is_what_the_bundle_chose(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    for part, precision in (("image", "int8"), ("text", "fp32"), ("file", "int8")):
        with open_subject(spec_of(tiny_bundle, cpu_device, part)) as subject:
            assert subject.identity.precision == precision


def test_weights_beside_the_graph_count(
    own_bundle: Path,
    cpu_device: DeviceProfile,
    edit_manifest: Callable[[Path, Callable[[dict[str, Any]], None]], None],
    reseal: Callable[[Path], None],
) -> None:
    size = save_with_data(own_bundle / GRAPH, own_bundle / GRAPH)

    def change(data: dict[str, Any]) -> None:
        data["files"].append({"path": f"{GRAPH}_data", "bytes": 0, "sha256": "0" * 64})
        for file in (file for tower in data["towers"] for file in tower["files"]):
            if file["path"] == GRAPH:
                file["data_path"] = f"{GRAPH}_data"

    edit_manifest(own_bundle, change)
    reseal(own_bundle)
    with open_subject(spec_of(own_bundle, cpu_device, "image", precision="fp32")) as subject:
        assert subject.identity.bytes_on_disk == size
        subject.target.run(subject.target.make_batch(1))


def test_a_file_goes_the_encoder_s_way(
    tiny_bundle: Path, cpu_device: DeviceProfile, photos: Path
) -> None:
    files = tuple(str(photos / f"{name}.png") for name in ("green", "blue"))
    with open_subject(spec_of(tiny_bundle, cpu_device, "file", pictures=files)) as subject:
        batch = subject.target.make_batch(3)
        found = np.asarray(subject.target.run(batch))
    assert batch.tolist() == [Path(file).read_bytes() for file in (*files, files[0])]
    encoder = Encoder(Bundle.open(tiny_bundle), cpu_device)
    np.testing.assert_array_equal(found[:2], encoder.encode_image(list(files)))
    assert subject.identity.input_shape == (1, 12, 20, 3)


def test_sample_pictures_stand_in_for_photos(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    with open_subject(spec_of(tiny_bundle, cpu_device, "file")) as subject:
        batch = subject.target.make_batch(4)
        assert np.asarray(subject.target.run(batch)).shape == (4, 8)
    assert tuple(batch) == sample_pictures()
    assert subject.identity.input_shape == (1, 480, 640, 3)
    for content in sample_pictures():
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.size) == ("JPEG", (640, 480))
        assert 50_000 < len(content) < 250_000  # as photos of that size are


def test_one_tower_s_precision_is_not_asked_of_the_other(
    own_bundle: Path,
    cpu_device: DeviceProfile,
    edit_manifest: Callable[[Path, Callable[[dict[str, Any]], None]], None],
) -> None:
    name = "onnx/text_model_int8.onnx"
    (own_bundle / name).unlink()

    def change(data: dict[str, Any]) -> None:
        data["files"] = [file for file in data["files"] if file["path"] != name]
        for tower in data["towers"]:
            tower["files"] = [file for file in tower["files"] if file["path"] != name]

    edit_manifest(own_bundle, change)
    with open_subject(spec_of(own_bundle, cpu_device, "file", precision="int8")) as subject:
        assert subject.identity.precision == "int8"


def test_nothing_runs_in_the_place_of_a_wrong_engine(
    tiny_bundle: Path, cpu_device: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise EngineParityError("it is wrong here")

    monkeypatch.setattr(encoder_module, "TowerRunner", wrong)
    with pytest.raises(EngineParityError, match="it is wrong here"):
        open_subject(spec_of(tiny_bundle, cpu_device, "file"))


def test_what_cannot_be_opened(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp32",))
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(sample_pictures()[0][:1000])
    missing = (str(tmp_path / "none.jpg"),)
    for spec, kind, message in (
        (spec_of(tiny_bundle, cpu_device, "image", precision="fp16"), BundleError, "no fp16 image"),
        (spec_of(tiny_bundle, device, "file", precision="int8"), InputError, "not allow int8"),
        (spec_of(tmp_path, cpu_device, "text"), BundleError, "is no bundle"),
        (spec_of(tiny_bundle, cpu_device, "file", pictures=missing), InputError, "none.jpg does"),
        (
            spec_of(tiny_bundle, cpu_device, "file", pictures=(str(damaged),)),
            InputError,
            r"damaged\.jpg cannot be decoded",
        ),
    ):
        with pytest.raises(kind, match=message):
            open_subject(spec)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_of_a_bundle(tiny_bundle: Path, cpu_device: DeviceProfile, tower: Any) -> None:
    targets = bundle_targets(Bundle.open(tiny_bundle), tower, cpu_device)
    measured = measure_interleaved(
        targets, dataclasses.replace(QUICK, batch_sizes=(1, 3)), part=tower, reference="fp32"
    )
    assert [item.name for item in measured] == ["fp32", "int8"]
    assert [item.ratio is None for item in measured] == [True, False]
    for item in measured:
        latency = item.latency
        assert 0 <= latency.p50_ms.low <= latency.p50_ms.value <= latency.p50_ms.high
        assert item.cpu.process_s >= 0
        assert [(point.batch, point.threads) for point in item.sweep] == [(1, 1), (3, 1)]
    run = measurement_run(measured, workload=QUICK, command="measure")
    assert MeasurementRun.from_json(run.to_json(), source="x") == run


def test_batches_repeat_the_golden_inputs(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    bundle = Bundle.open(tiny_bundle)
    target = bundle_targets(bundle, "image", cpu_device, prefix="student ")[1]
    assert target.name == "student int8"
    pixels = bundle.golden().pixels
    batch = target.make_batch(len(pixels) + 1)
    assert np.array_equal(batch[-1], pixels[0])


def test_a_device_that_allows_nothing_the_bundle_holds(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16",))
    with pytest.raises(InputError, match="can run none of fp32, int8, which the bundle holds"):
        bundle_targets(Bundle.open(tiny_bundle), "image", device)
