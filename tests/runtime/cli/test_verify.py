import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeclip.runtime.bundle.bundle import Bundle, Expected, Golden
from edgeclip.runtime.cli.verify import replay_golden
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import BundleError

Reseal = Callable[[Path], None]
Change = Callable[[Golden], Golden]


@pytest.fixture
def golden(tiny_bundle: Path) -> Golden:
    return Bundle.open(tiny_bundle).golden()


def shifted(golden: Golden, by: float) -> Golden:
    """Move one value of the fp32 image tower's expected embeddings."""

    def move(item: Expected) -> Expected:
        if (item.tower, item.precision) != ("image", "fp32"):
            return item
        embeddings = item.embeddings.copy()
        embeddings[1, 2] += by
        return dataclasses.replace(item, embeddings=embeddings)

    return dataclasses.replace(golden, expected=tuple(map(move, golden.expected)))


def test_round_trip(golden: Golden, tiny_bundle: Path, tmp_path: Path) -> None:
    golden.save(tmp_path / "golden.npz")
    again = Golden.load(tmp_path / "golden.npz", Bundle.open(tiny_bundle).manifest)
    assert again.texts == golden.texts
    np.testing.assert_array_equal(again.pixels, golden.pixels)
    np.testing.assert_array_equal(again.input_ids, golden.input_ids)
    for found, expected in zip(again.expected, golden.expected, strict=True):
        assert (found.tower, found.precision) == (expected.tower, expected.precision)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)


def test_whole_bundle_passes_in_every_precision(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    replays = replay_golden(Bundle.open(tiny_bundle), cpu_device)
    assert {(item.tower, item.precision) for item in replays} == {
        *(("image", "fp32"), ("image", "int8"), ("text", "fp32"), ("text", "int8"))
    }
    for item in replays:
        assert item.passed
        assert item.deviation < 1e-6
        assert item.cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("by", "passed"), [(5e-5, True), (-5e-5, True), (2e-4, False)])
def test_deviation_is_measured_against_the_tolerance(
    own_bundle: Path,
    reseal: Reseal,
    cpu_device: DeviceProfile,
    golden: Golden,
    by: float,
    passed: bool,
) -> None:
    shifted(golden, by).save(own_bundle / "golden.npz")
    reseal(own_bundle)
    by_tower = {
        (item.tower, item.precision): item
        for item in replay_golden(Bundle.open(own_bundle), cpu_device)
    }
    image = by_tower["image", "fp32"]
    assert image.deviation == pytest.approx(abs(by), rel=1e-2)
    assert image.tolerance == 1e-4
    assert image.passed == passed
    assert by_tower["image", "int8"].passed


def test_only_what_the_device_allows_is_replayed(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    bundle = Bundle.open(tiny_bundle)
    replays = replay_golden(bundle, dataclasses.replace(cpu_device, precisions=("int8",)))
    assert [item.precision for item in replays] == ["int8", "int8"]
    with pytest.raises(BundleError, match="allows no precision"):
        replay_golden(bundle, dataclasses.replace(cpu_device, precisions=("fp16",)))


def test_tokenizer_that_changed_its_mind(
    own_bundle: Path, reseal: Reseal, cpu_device: DeviceProfile, golden: Golden
) -> None:
    other = dataclasses.replace(golden, texts=("another text", *golden.texts[1:]))
    other.save(own_bundle / "golden.npz")
    reseal(own_bundle)
    with pytest.raises(BundleError, match="gives other token ids"):
        replay_golden(Bundle.open(own_bundle), cpu_device)


def test_a_collapsed_tower_does_not_pass(
    own_bundle: Path, reseal: Reseal, cpu_device: DeviceProfile, golden: Golden
) -> None:
    """Even if its golden embeddings were recorded so."""
    path = own_bundle / "onnx" / "text_model.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    last = next(node for node in model.graph.node if output.name in node.output)
    last.output[:] = ["told_apart"]
    for name, value in (
        ("zero", 0.0),
        ("all_alike", golden.expected[0].embeddings.shape[1] ** -0.5),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node.append(helper.make_node("Mul", ["told_apart", "zero"], ["nothing"]))
    model.graph.node.append(helper.make_node("Add", ["nothing", "all_alike"], [output.name]))
    onnx.save(model, path)
    reseal(own_bundle)
    with pytest.raises(BundleError, match="text tower in fp32 gives all golden inputs one embed"):
        replay_golden(Bundle.open(own_bundle), cpu_device)


def replaced(**fields: Any) -> Change:
    return lambda golden: dataclasses.replace(golden, **fields)


def with_nan(golden: Golden) -> Golden:
    return shifted(golden, float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(pixels=np.zeros((2, 4, 4, 3), np.uint8)), "pixels must be"),
        (replaced(pixels=np.zeros((3, 8, 8, 3))), "pixels must be"),
        (replaced(pixels=np.zeros((2, 8, 8, 3), np.uint8)), r"must be float32 \[2, 8\]"),
        (replaced(input_ids=np.zeros((4, 17), np.int64)), "at most 16"),
        (replaced(texts=("one",)), "as many texts"),
        (replaced(expected=()), "missing keys"),
        (with_nan, "not finite"),
    ],
)
def test_golden_file_that_does_not_fit(
    golden: Golden, tiny_bundle: Path, tmp_path: Path, change: Change, message: str
) -> None:
    change(golden).save(tmp_path / "golden.npz")
    with pytest.raises(BundleError, match=message):
        Golden.load(tmp_path / "golden.npz", Bundle.open(tiny_bundle).manifest)


def test_damaged_golden_file(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "golden.npz").write_bytes(b"PK\x03\x04 nothing more")
    with pytest.raises(BundleError, match="damaged"):
        Golden.load(tmp_path / "golden.npz", Bundle.open(tiny_bundle).manifest)
