import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeclip.profiles.measure.subject import SplitSpec, SubjectSpec, bundle_subjects, example_feed
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, InputError
from tests.runtime.serving.models_of_bundle import plan


def test_json_round_trip(cpu_device: DeviceProfile) -> None:
    split = SplitSpec(plan="plan.json", server="https://there:8443", fingerprint="ab:cd")
    for spec in (
        SubjectSpec(name="int8", part="image", device=cpu_device, bundle="b", precision="int8"),
        SubjectSpec(name="s", part="split", device=cpu_device, bundle="b", split=split),
        SubjectSpec(
            name="theirs",
            part="text",
            device=cpu_device,
            model="m.onnx",
            axes=(("sequence_length", 77),),
        ),
    ):
        assert parse(SubjectSpec, dataclasses.asdict(spec), source="x") == spec


def test_all_contradictions_are_told_at_once(cpu_device: DeviceProfile) -> None:
    fields = {
        "name": " ",
        "part": "split",
        "device": dataclasses.asdict(cpu_device),
        "model": "m.onnx",
        "precision": "int8",
    }
    with pytest.raises(ConfigError) as found:
        parse(SubjectSpec, fields, source="x")
    for mistake in ("name must not be empty", "has no precision to choose", "split is for"):
        assert mistake in str(found.value)
    for wrong, mistake in (
        ({}, "give one of them"),
        ({"bundle": "b", "model": "m"}, "give one of them"),
        ({"bundle": "b", "pictures": ("a.jpg",)}, "pictures are for"),
        ({"bundle": "b", "axes": (("length", 3),)}, "axes are for a model"),
    ):
        with pytest.raises(ValueError, match=mistake):
            SubjectSpec(name="a", part="image", device=cpu_device, **wrong)


def test_subjects_of_a_bundle(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    bundle = Bundle.open(tiny_bundle)
    found = bundle_subjects(bundle, cpu_device, pictures=["a.jpg"])
    assert [spec.title for spec in found] == [
        "image fp32",
        "image int8",
        "text fp32",
        "text int8",
        "file int8",  # what the bundle chose
    ]
    assert [spec.pictures for spec in found] == [()] * 4 + [("a.jpg",)]
    assert {spec.bundle for spec in found} == {str(bundle.path)}
    fp32_only = dataclasses.replace(cpu_device, precisions=("fp32",))
    titles = [spec.title for spec in bundle_subjects(bundle, fp32_only, ("text", "file"))]
    assert titles == ["text fp32", "file fp32"]


def test_a_split_bears_its_plan_s_name(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    bundle, path = Bundle.open(tiny_bundle), tmp_path / "plan.json"
    with pytest.raises(InputError, match="needs a plan"):
        bundle_subjects(bundle, cpu_device, ("split",))
    split = SplitSpec(plan=str(path), server="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cannot read .*plan\.json"):
        bundle_subjects(bundle, cpu_device, ("split",), split=split)
    plan(name="send it all").save(path)
    (spec,) = bundle_subjects(bundle, cpu_device, ("split",), split=split)
    assert (spec.title, spec.precision, spec.split) == ("split send it all", "int8", split)


def test_a_device_that_can_run_nothing_of_it(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    device = dataclasses.replace(cpu_device, precisions=("fp16",))
    with pytest.raises(InputError, match="can run none of fp32, int8"):
        bundle_subjects(Bundle.open(tiny_bundle), device)


def test_a_graph_of_one_batch_size_is_fed_such_a_batch(
    own_bundle: Path, edit_manifest: Callable[[Path, Callable[[dict[str, Any]], None]], None]
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["towers"][0]["files"][0]["batch"] = 3

    edit_manifest(own_bundle, change)
    bundle = Bundle.open(own_bundle)
    assert example_feed(bundle, "image", "fp32")["pixel_values"].shape == (3, 3, 8, 8)
    assert example_feed(bundle, "image", "int8")["pixels"].shape == (1, 8, 8, 3)
