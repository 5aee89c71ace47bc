"""ONNX Runtime sessions: outputs, plug-in providers, placement of nodes, compiled contexts."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.engines.onnxruntime_engine import (
    OrtEngine,
    cache_folder,
    data_entries,
    embed_context,
    is_plugin,
    load_cuda_libraries,
    placement_entries,
    plugin_devices,
    precision_of,
    read_inputs,
)
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Precision

CPU = ("CPUExecutionProvider",)
AZURE = "AzureExecutionProvider"  # in the usual builds, and takes no node of such graphs
needs_azure = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"this onnxruntime has no {AZURE}"
)

needs_assignments = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="onnxruntime before 1.24 does not tell which provider takes a node",
)


@pytest.fixture
def tower(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "vision_model.onnx"


def pixels(count: int) -> FloatArray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_runs_a_batch_of_any_size(tower: Path) -> None:
    engine = OrtEngine(tower, providers=CPU, threads=1)
    assert engine.name == "onnxruntime-cpu"
    for count in (1, 5):
        outputs = engine.run({"pixel_values": pixels(count)})
        assert set(outputs) == {"image_embeds"}
        assert outputs["image_embeds"].shape == (count, 8)
        assert outputs["image_embeds"].dtype == np.float32


def test_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"onnxruntime-cpu cannot load .*a\.onnx"):
        OrtEngine(tmp_path / "a.onnx", providers=CPU, threads=1)


def test_content_is_loaded_in_place_of_the_file(tower: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.onnx"
    engine = OrtEngine(absent, providers=CPU, threads=1, content=tower.read_bytes())
    assert set(engine.run({"pixel_values": pixels(2)})) == {"image_embeds"}
    assert engine._session._model_bytes is None
    with pytest.raises(EngineError, match=r"cannot load .*absent\.onnx"):
        OrtEngine(absent, providers=CPU, threads=1, content=b"not a graph")


def rows_graph(location: str) -> bytes:
    """A graph that looks up rows of a table of ones [30, 2] in another file."""
    rows = onnx.TensorProto(name="rows", data_type=onnx.TensorProto.FLOAT, dims=[30, 2])
    rows.data_location = onnx.TensorProto.EXTERNAL
    rows.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["rows", "row"], ["found"])],
        "rows",
        [helper.make_tensor_value_info("row", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, ["n", 2])],
        [rows],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def write_rows(folder: Path, value: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "rows.bin").write_bytes(np.full((30, 2), value, np.float32).tobytes())


@pytest.mark.parametrize("location", ["rows.bin", "deep/rows.bin", "../rows.bin"])
def test_content_reads_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """Left alone, ONNX Runtime reads a graph's data files from the current directory."""
    path = tmp_path / "onnx" / "rows.onnx"
    for folder in (tmp_path, path.parent, path.parent / "deep"):
        write_rows(folder, 1)
    content = rows_graph(location)
    path.write_bytes(content)
    monkeypatch.chdir(path.parent)
    with pytest.raises(EngineError, match=r"cannot load .*rows\.onnx"):
        OrtEngine(path, providers=CPU, threads=1, content=content)


def test_content_reads_data_files_of_the_folder_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, current = tmp_path / "given", tmp_path / "current"
    write_rows(given, 7)
    write_rows(current, 1)
    monkeypatch.chdir(current)
    path = current / "rows.onnx"
    engine = OrtEngine(
        path, providers=CPU, threads=1, content=rows_graph("rows.bin"), data_folder=given
    )
    found = engine.run({"row": np.array([3])})["found"]
    np.testing.assert_array_equal(found, [[7, 7]])


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="onnxruntime before 1.24 follows such paths",
)
def test_content_reads_no_file_outside_the_folder_it_is_given(tmp_path: Path) -> None:
    write_rows(tmp_path, 1)
    given, content = tmp_path / "given", rows_graph("../rows.bin")
    given.mkdir()
    with pytest.raises(EngineError, match=r"cannot load .*rows\.onnx"):
        OrtEngine(given / "rows.onnx", providers=CPU, threads=1, content=content, data_folder=given)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load"):
        OrtEngine(tmp_path / "absent.onnx", providers=CPU, threads=1)


def test_inputs_that_do_not_fit(tower: Path) -> None:
    engine = OrtEngine(tower, providers=CPU, threads=1)
    for feeds in (
        {"wrong_name": pixels(1)},
        {"pixel_values": pixels(1).astype(np.float64)},
        {"pixel_values": pixels(1)[:, :, :4]},
    ):
        with pytest.raises(EngineError, match=r"onnxruntime-cpu failed on .*vision_model\.onnx"):
            engine.run(feeds)


def test_session_runs_as_the_device_says(tower: Path) -> None:
    engine = OrtEngine(tower, providers=CPU, threads=3)
    options = engine._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_absent_provider_is_an_error_and_not_the_cpu(tower: Path, name: str) -> None:
    if name in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime is built with {name}")
    with pytest.raises(EngineError, match=rf"no {name} .*: install edgeclip\[gpu\]"):
        OrtEngine(tower, providers=(name, *CPU), threads=1)


def test_unknown_provider(tower: Path) -> None:
    with pytest.raises(EngineError, match=r"no AbacusExecutionProvider \(it has .*another device"):
        OrtEngine(tower, providers=("AbacusExecutionProvider",), threads=1)


@needs_azure
@needs_assignments
def test_provider_that_leaves_all_nodes_to_the_cpu(tower: Path) -> None:
    match = (
        rf"{AZURE} leaves 5 of the 5 nodes of .*vision_model.onnx to another provider: "
        r".*\(GlobalAveragePool\), .*\(Flatten\), .*\(Gemm\).*cpu_fallback: true"
    )
    with pytest.raises(EngineError, match=match):
        OrtEngine(tower, providers=(AZURE,), threads=1)


@needs_azure
def test_fallback_that_is_allowed(tower: Path) -> None:
    engine = OrtEngine(tower, providers=(AZURE,), threads=1, cpu_fallback=True)
    assert engine.name == AZURE
    expected = OrtEngine(tower, providers=CPU, threads=1).run({"pixel_values": pixels(2)})
    found = engine.run({"pixel_values": pixels(2)})
    np.testing.assert_array_equal(found["image_embeds"], expected["image_embeds"])


@needs_azure
def test_fallback_with_an_onnxruntime_that_cannot_tell(
    tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.24 onnxruntime has no such method, but refuses by itself when told to."""
    for kind in onnxruntime.InferenceSession.__mro__:
        if "get_provider_graph_assignment_info" in vars(kind):
            monkeypatch.delattr(kind, "get_provider_graph_assignment_info")
    with pytest.raises(EngineError, match=r"cannot load .* on the CPU: set cpu_fallback: true"):
        OrtEngine(tower, providers=(AZURE, *CPU), threads=1)
    OrtEngine(tower, providers=(AZURE, *CPU), threads=1, cpu_fallback=True)
    OrtEngine(tower, providers=CPU, threads=1)


@pytest.mark.gpu
def test_cuda_runs(tower: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    on_cpu = OrtEngine(tower, providers=CPU, threads=1)
    on_gpu = OrtEngine(tower, providers=("CUDAExecutionProvider",), threads=1)
    assert on_gpu.name == "onnxruntime-cuda"
    feeds = {"pixel_values": pixels(3)}
    expected, found = on_cpu.run(feeds)["image_embeds"], on_gpu.run(feeds)["image_embeds"]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_missing_onnxruntime_names_the_extras(tower: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine\n"
        "from edgeclip.runtime.errors import MissingExtraError\n"
        "try: OrtEngine(Path(sys.argv[1]), providers=('CPUExecutionProvider',), threads=1)\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tower)], capture_output=True, text=True, check=True
    )
    assert "pip install 'edgeclip[cpu]' or 'edgeclip[gpu]'" in done.stdout


def write_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> str:
    """A package as plugins come in; its library is whatever the test puts there."""
    name = "plugin_of_this_test"
    code = f"def get_library_path():\n    return {str(library)!r}\n"
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    return name


def test_plugin_that_is_absent() -> None:
    with pytest.raises(ImportError):
        plugin_devices(onnxruntime, "AbacusExecutionProvider", "no_such_plugin")


def test_plugin_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"not a library")
    module = write_plugin(tmp_path, monkeypatch, library)
    for _ in range(2):  # it may not be taken for a registered one afterwards
        with pytest.raises(EngineError, match=f"{module} cannot be loaded: .*check the driver"):
            plugin_devices(onnxruntime, "AbacusExecutionProvider", module)
    assert not is_plugin(onnxruntime, "AbacusExecutionProvider")


def test_onnxruntime_without_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write_plugin(tmp_path, monkeypatch, tmp_path / "library.so")
    with pytest.raises(ImportError, match=r"before 1\.23"):
        plugin_devices(ModuleType("onnxruntime"), "AbacusExecutionProvider", module)


def test_folder_of_data_files() -> None:
    graph, folder = Path("onnx/a.onnx"), Path("onnx")
    assert data_entries(graph, None, folder) == {}
    assert list(data_entries(graph, b"", None).values()) == [str(graph)]
    assert list(data_entries(graph, b"", folder).values()) == [str(folder)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_precision_of_the_names_that_a_bundle_uses(precision: Precision) -> None:
    for path in (
        tower_path("text", precision),
        tower_path("image", precision),
        tower_path("image", precision, "uint8-nhwc"),
    ):
        assert precision_of(Path(path)) == precision


def test_precision_of_other_names() -> None:
    assert precision_of(Path("vision_model.onnx")) == "fp32"
    assert precision_of(Path("int8/model.onnx")) == "fp32"


def test_inputs_of_a_file_and_of_content(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tiny_bundle / tower_path("text", "fp32")
    expected = (("input_ids", (None, None)),)
    assert read_inputs(path, None, None) == expected
    assert read_inputs(tmp_path / "absent.onnx", path.read_bytes(), None) == expected
    image = tiny_bundle / tower_path("image", "fp32")
    assert read_inputs(image, None, None) == (("pixel_values", (None, 3, 8, 8)),)


def test_what_the_cpu_cannot_load_has_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    assert read_inputs(tmp_path / "a.onnx", None, None) == ()


_LIBRARY = "int getInferLibVersion(void) { return %d; }"
_ASK = """
from edgeclip.runtime.engines.onnxruntime_engine import cache_folder, tensorrt_version
print(tensorrt_version(), cache_folder(b"a", None).name)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_cache_folder_belongs_to_one_tensorrt(tmp_path: Path) -> None:
    found = set()
    for version in (100304, 101600):
        folder = tmp_path / str(version)
        folder.mkdir()
        code, library = folder / "stub.c", folder / "libnvinfer.so.10"
        code.write_text(_LIBRARY % version, encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, code], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        words = [sys.executable, "-c", _ASK]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        told, name = done.stdout.split()
        assert told == str(version)
        found.add(name)
    assert len(found) == 2


def test_what_is_said_of_missing_libraries_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def preload() -> None:
        print("Failed to load libcudnn.so.9: no such file")

    caplog.set_level("INFO")
    load_cuda_libraries(SimpleNamespace(preload_dlls=preload))
    load_cuda_libraries(SimpleNamespace())  # of a version that has none
    assert "libcudnn.so.9" in caplog.text
    assert capsys.readouterr().out == ""


def test_cache_folder_belongs_to_one_graph(tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "weights.bin").write_bytes(b"1")
    folders = {cache_folder(content, None) for content in (b"a", b"b")}
    folders |= {cache_folder(b"a", data)}
    assert cache_folder(b"a", data) in folders
    os.utime(data / "weights.bin", (1, 1))  # other weights of the same size
    folders |= {cache_folder(b"a", data)}
    assert len(folders) == 4
    for folder in folders:
        assert folder.parent == cache / "onnxruntime"
        assert folder.stat().st_mode & 0o777 == 0o700


def test_cache_folder_that_cannot_be_made(cache: Path) -> None:
    cache.write_bytes(b"a file")
    with pytest.raises(EngineError, match=r"cannot make a cache folder.*set EDGECLIP_CACHE"):
        cache_folder(b"a", None)


def write_graph(path: Path, nodes: list[NodeProto]) -> Path:
    """A graph of x float32 [n, 2] to int64 or float32 `y`."""
    kind = TensorProto.FLOAT if nodes[-1].op_type == "Mul" else TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@needs_azure
@needs_assignments
def test_arithmetic_on_shapes_may_run_on_the_cpu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Concat", ["shape", "shape"], ["y"], name="twice", axis=0),
    ]
    path = write_graph(tmp_path / "shapes.onnx", nodes)
    engine = OrtEngine(path, providers=(AZURE,), threads=1)
    found = engine.run({"x": np.zeros((3, 2), np.float32)})["y"]
    np.testing.assert_array_equal(found, [3, 2, 3, 2])


@needs_azure
@needs_assignments
def test_the_error_names_what_computes_and_nothing_else(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"], name="same"),
        helper.make_node("Unsqueeze", ["same", "axis"], ["more"], name="unsqueeze"),
        helper.make_node("Mul", ["more", "more"], ["y"], name="square"),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["axis"], value_ints=[0], name="axis"))
    path = write_graph(tmp_path / "mixed.onnx", nodes)
    with pytest.raises(EngineError, match=r"leaves 1 of the \d nodes .*provider: square \(Mul\): "):
        OrtEngine(path, providers=(AZURE,), threads=1)


@needs_azure
@needs_assignments
def test_long_lists_are_cut(tmp_path: Path) -> None:
    names = ["x", *(f"v{count}" for count in range(6)), "y"]
    nodes = [
        helper.make_node("Mul", [given, "x"], [made], name=f"times{count}")
        for count, (given, made) in enumerate(pairwise(names))
    ]
    path = write_graph(tmp_path / "long.onnx", nodes)
    with pytest.raises(EngineError, match=r"leaves 7 of the 7 nodes") as raised:
        OrtEngine(path, providers=(AZURE,), threads=1)
    assert str(raised.value).count("(Mul)") == 5
    assert "(Mul), ...:" in str(raised.value)


def test_entry_suits_this_onnxruntime() -> None:
    (key,) = placement_entries(onnxruntime)
    told = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    assert (
        key == f"session.{'record_ep_graph_assignment_info' if told else 'disable_cpu_ep_fallback'}"
    )


@pytest.fixture
def openvino(cpu_device: DeviceProfile, tower: Path) -> DeviceProfile:
    """A device with OpenVINO, where it is installed and finds hardware."""
    device = dataclasses.replace(cpu_device, engine="onnxruntime-openvino")
    try:
        open_engine(tower, device=device)
    except EngineError as error:
        absent = ("has no OpenVINOExecutionProvider", "supports no hardware")
        if any(text in str(error) for text in absent):
            pytest.skip(str(error))
        raise
    return device


@pytest.mark.parametrize("name", ["vision_model.onnx", "text_model.onnx", "text_model_int8.onnx"])
def test_openvino_gives_what_the_cpu_gives(
    tiny_bundle: Path, cpu_device: DeviceProfile, openvino: DeviceProfile, name: str
) -> None:
    path = tiny_bundle / "onnx" / name
    for count in (1, 3):
        ids = np.random.default_rng(0).integers(0, 200, (count, 5))
        feeds = {"pixel_values": pixels(count)} if "vision" in name else {"input_ids": ids}
        engine = open_engine(path, device=openvino, content=path.read_bytes())
        assert engine.name == "onnxruntime-openvino"
        ((_, found),) = engine.run(feeds).items()
        ((_, expected),) = open_engine(path, device=cpu_device).run(feeds).items()
        # Some versions also quantize what is multiplied by weights stored in int8.
        np.testing.assert_allclose(found, expected, atol=5e-3 if "int8" in name else 1e-5)


def test_openvino_leaves_an_operator_to_the_cpu(tmp_path: Path, openvino: DeviceProfile) -> None:
    path = tmp_path / "odd.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["y"], name="product"),
        helper.make_node("Det", ["y"], ["z"], name="determinant"),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 2, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    told = (
        r"leaves 1 of the 2 nodes .*: determinant \(Det\): .*|some nodes would run on the CPU: .*"
    )
    with pytest.raises(EngineError, match=rf"({told})cpu_fallback: true"):
        open_engine(path, device=openvino)
    allowed = dataclasses.replace(openvino, cpu_fallback=True)
    x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    found = open_engine(path, device=allowed).run({"x": x})["z"]
    np.testing.assert_allclose(found, np.linalg.det(x @ x), atol=1e-4)


def test_context_runs_like_the_graph(tower: Path, tmp_path: Path, openvino: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    if "OpenVINOExecutionProvider" not in {item.ep_name for item in onnxruntime.get_ep_devices()}:
        # The wheels of onnxruntime-openvino lack the library that reads contexts of CPUs.
        with pytest.raises(EngineError, match=r"cannot read the context .* another build"):
            embed_context(tower, device=openvino, target=target)
        assert list(tmp_path.iterdir()) == []
        return
    embed_context(tower, device=openvino, target=target)
    assert list(tmp_path.iterdir()) == [target]
    expected = open_engine(tower, device=openvino).run({"pixel_values": pixels(3)})
    for content in (None, target.read_bytes()):
        found = open_engine(target, device=openvino, content=content)
        np.testing.assert_array_equal(
            found.run({"pixel_values": pixels(3)})["image_embeds"],
            expected["image_embeds"],
        )


def test_provider_without_contexts(tower: Path, tmp_path: Path, cpu_device: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    with pytest.raises(EngineError, match=r"nothing ahead of time.* onnxruntime-openvino"):
        embed_context(tower, device=cpu_device, target=target)
    assert list(tmp_path.iterdir()) == []


def test_provider_that_is_absent_leaves_no_file(
    tower: Path, tmp_path: Path, cpu_device: DeviceProfile
) -> None:
    device = dataclasses.replace(cpu_device, engine="onnxruntime-openvino")
    if importlib.util.find_spec("onnxruntime_ep_openvino") is not None:
        pytest.skip("the plugin of OpenVINO is installed")
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has OpenVINO")
    target = tmp_path / "context.onnx"
    with pytest.raises(EngineError, match=r"no OpenVINOExecutionProvider .*: install onnx"):
        embed_context(tower, device=device, target=target)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_survives_a_failure(tmp_path: Path, openvino: DeviceProfile) -> None:
    target = tmp_path / "context.onnx"
    target.write_bytes(b"of before")
    (tmp_path / "a.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot load"):
        embed_context(tmp_path / "a.onnx", device=openvino, target=target)
    assert target.read_bytes() == b"of before"
