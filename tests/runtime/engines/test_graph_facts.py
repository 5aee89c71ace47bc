import os
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.engines.ort_session import cache_folder, precision_of, read_inputs
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.spec import Precision


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
