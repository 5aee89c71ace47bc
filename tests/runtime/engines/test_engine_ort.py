import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.errors import EngineError

CPU = ("CPUExecutionProvider",)
AZURE = "AzureExecutionProvider"  # in the usual builds, and takes no node of such graphs
needs_azure = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"this onnxruntime has no {AZURE}"
)


@pytest.fixture
def tower(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx" / "vision_model.onnx"


def pixels(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
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
