from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest

from edgeclip.runtime.engines.ort_session import data_entries, is_plugin, plugin_devices
from edgeclip.runtime.errors import EngineError


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
