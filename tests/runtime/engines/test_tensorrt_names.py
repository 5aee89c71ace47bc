"""Every name of TensorRT that the source uses is one of its bindings', of each version in use.

What the bindings have was asked by `tests/benchmarks/trt_names.py`, which fetches them.
"""

import json

import pytest

from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary
from tests.runtime.engines.tensorrt_names import ROOT, required_of, used_names

KEPT = ROOT / "profiles" / "results" / "trt-names.json"
BINDINGS = json.loads(KEPT.read_text(encoding="utf-8"))["bindings"]


def test_the_versions_of_every_jetpack_were_asked() -> None:
    found = {(item["library"], item["version"].split(".")[0]) for item in BINDINGS}
    assert found == {("tensorrt", "10"), ("tensorrt", "11"), ("tensorrt-rtx", "1")}
    assert any(item["version"].startswith("10.3.") for item in BINDINGS)


@pytest.mark.parametrize("item", BINDINGS, ids=lambda item: f"{item['library']} {item['version']}")
def test_every_name_is_there(item: dict[str, list[str]]) -> None:
    missing = required_of(str(item["library"])) - set(item["has"])
    assert not missing, "run tests/benchmarks/trt_names.py if the source uses new names"
    assert not item["bare_errors"]


def test_names_are_read_from_the_source() -> None:
    names = used_names()
    assert {"Builder", "BuilderFlag.TF32", "IExecutionContext.execute_async_v3"} <= names
    assert {"ICudaEngine.num_io_tensors", "OnnxParser.num_errors", "Runtime"} <= names


def test_the_installed_one_has_them(rtx: TensorRtLibrary) -> None:
    for name in required_of("tensorrt-rtx"):
        owner = rtx.module
        for part in name.split("."):
            assert hasattr(owner, part), name
            owner = getattr(owner, part)
