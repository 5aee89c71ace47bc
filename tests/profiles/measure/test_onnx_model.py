"""A peer's ONNX file: its session, its made-up inputs, its external data files."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.profiles.measure.onnx_model import data_files
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import EngineError, InputError
from tests.data_file import save_with_data


def opened(path: Path, device: DeviceProfile, **changes: Any) -> OpenSubject:
    return open_subject(
        SubjectSpec(name="peer", part="text", device=device, model=str(path), **changes)
    )


def write_model(path: Path, inputs: dict[str, tuple[int, list[Any]]]) -> Path:
    """A graph whose outputs are the sizes of its inputs, and nothing else."""
    nodes = [helper.make_node("Shape", [name], [f"{name}_shape"]) for name in inputs]
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info(name, *given) for name, given in inputs.items()],
        [
            helper.make_tensor_value_info(f"{name}_shape", TensorProto.INT64, [len(shape)])
            for name, (_, shape) in inputs.items()
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def shapes_seen(subject: OpenSubject, size: int) -> list[list[int]]:
    found: Any = subject.target.run(subject.target.make_batch(size))
    return [item.tolist() for item in found]


def test_a_graph_of_somebody_else(tiny_bundle: Path, cpu_device: DeviceProfile) -> None:
    path = tiny_bundle / "onnx" / "vision_model.onnx"
    with opened(path, cpu_device) as subject:
        for size in (1, 3):
            found: Any = subject.target.run(subject.target.make_batch(size))
            assert found[0].shape == (size, 8)
    identity = subject.identity
    assert (identity.bundle, identity.sha256) == ("vision_model.onnx", sha256_file(path))
    assert (identity.precision, identity.provider) == (None, "CPUExecutionProvider")
    assert (identity.threads, identity.input_shape) == (1, (1, 3, 8, 8))
    assert identity.bytes_on_disk == path.stat().st_size


def test_weights_beside_the_graph_count(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    path = tmp_path / "text.onnx"
    size = save_with_data(tiny_bundle / "onnx" / "text_model.onnx", path)
    with opened(path, cpu_device, axes=(("input_ids.1", 5),)) as subject:
        assert subject.identity.bytes_on_disk == size


def test_every_input_is_made_up(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    path = write_model(
        tmp_path / "m.onnx",
        {
            "input_ids": (TensorProto.INT64, ["text_batch", "length"]),
            "pixel_values": (TensorProto.FLOAT16, ["image_batch", 3, "height", 5]),
            "pixels": (TensorProto.UINT8, ["image_batch", 4]),
            "flags": (TensorProto.BOOL, [2]),
        },
    )
    axes = (("length", 77), ("height", 6))
    with opened(path, cpu_device, axes=axes) as subject:
        assert shapes_seen(subject, 2) == [[2, 77], [2, 3, 6, 5], [2, 4], [2]]
        assert subject.identity.input_shape == (1, 77)
    for given, missing in (((), "length"), (axes[:1], "height")):
        with pytest.raises(InputError, match=f"the axis '{missing}' .*: say so with --peer-axis"):
            opened(path, cpu_device, axes=given)


def test_an_axis_without_a_name_goes_by_its_place(
    tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    path = write_model(tmp_path / "m.onnx", {"ids": (TensorProto.INT64, ["n", None])})
    with pytest.raises(InputError, match=r"--peer-axis ids\.1=SIZE"):
        opened(path, cpu_device)
    with opened(path, cpu_device, axes=(("ids.1", 5),)) as subject:
        assert shapes_seen(subject, 2) == [[2, 5]]


def test_a_fixed_batch_is_all_it_takes(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    one = write_model(tmp_path / "one.onnx", {"x": (TensorProto.FLOAT, [1, 3])})
    with opened(one, cpu_device) as subject:
        assert shapes_seen(subject, 1) == [[1, 3]]
        with pytest.raises(InputError, match="takes batches of 1 only, not of 8"):
            subject.target.make_batch(8)
    eight = write_model(tmp_path / "eight.onnx", {"x": (TensorProto.FLOAT, [8, 3])})
    with pytest.raises(InputError, match="takes batches of 8 only, not of 1"):
        opened(eight, cpu_device)


def test_what_cannot_be_opened(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    words = write_model(tmp_path / "words.onnx", {"x": (TensorProto.STRING, ["n"])})
    good = write_model(tmp_path / "good.onnx", {"x": (TensorProto.FLOAT, ["n"])})
    cuda = _cuda(cpu_device)
    for path, device, kind, message in (
        (tmp_path / "none.onnx", cpu_device, InputError, r"none\.onnx does not exist"),
        (broken, cpu_device, EngineError, r"cannot load .*broken\.onnx"),
        (words, cpu_device, InputError, r"input 'x' of tensor\(string\)"),
        (good, cuda, EngineError, "no CUDAExecutionProvider"),
        (good, load_device("rtx-4000-ada"), EngineError, "not ONNX Runtime"),
    ):
        with pytest.raises(kind, match=message):
            opened(path, device)


def test_a_graph_that_fails_says_so(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    path = write_model(tmp_path / "m.onnx", {"x": (TensorProto.FLOAT, ["n", 3])})
    with opened(path, cpu_device) as subject, pytest.raises(EngineError, match=r"m\.onnx failed"):
        subject.target.run(np.zeros((1, 4), np.float32))


def _cuda(device: DeviceProfile) -> DeviceProfile:
    return dataclasses.replace(
        device, engine="onnxruntime-cuda", precisions=("fp32",), compute_capability="8.9"
    )


def model_with_branches() -> onnx.ModelProto:
    """A graph with one constant of its own, and one in each branch of an `If`."""
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    branches = {}
    for name in ("then_branch", "else_branch"):
        constant = numpy_helper.from_array(np.ones(4, np.float32), f"{name}_c")
        node = helper.make_node("Identity", [f"{name}_c"], [f"{name}_o"])
        value = helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, [4])
        branches[name] = helper.make_graph([node], name, [], [value], [constant])
    nodes = [
        helper.make_node("If", ["condition"], ["chosen"], **branches),
        helper.make_node("Add", ["chosen", "own"], ["out"]),
    ]
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [1])
    own = numpy_helper.from_array(np.arange(4, dtype=np.float32), "own")
    return helper.make_model(helper.make_graph(nodes, "g", [condition], [out], [own]))


def keep_outside(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)


def test_finds_each_file_once_wherever_it_is_named(tmp_path: Path) -> None:
    model, path = model_with_branches(), tmp_path / "m.onnx"
    onnx.save(model, path)
    assert data_files(path) == ()
    keep_outside(model.graph.initializer[0], "m.onnx_data")
    for attribute, location in zip(
        model.graph.node[0].attribute, ("m.onnx_data", "more/branch.bin"), strict=True
    ):
        keep_outside(attribute.g.initializer[0], location)
    path.write_bytes(model.SerializeToString())
    assert data_files(path) == (tmp_path / "m.onnx_data", tmp_path / "more" / "branch.bin")


def test_agrees_with_the_package_onnx(tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx" / "text_model.onnx")
    path = tmp_path / "text.onnx"
    onnx.save(
        model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert {file.name for file in data_files(path)} == {
        file.name for file in tmp_path.iterdir() if file != path
    }


def test_refuses_what_is_no_graph(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.onnx", model_with_branches().SerializeToString()
    for content in (whole[: len(whole) // 2], b"\xff" * 40, b"\x0b\x0c", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"m\.onnx"):
            data_files(path)
    with pytest.raises(InputError, match="cannot read"):
        data_files(tmp_path / "none.onnx")
