import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.engine_records import (
    EngineKey,
    EngineRecord,
    GraphSource,
    engine_path,
    graph_sha256,
)
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary
from edgeclip.runtime.errors import ConfigError
from tests.runtime.tiny_graphs import a_key

SOURCE = GraphSource(name="vision_int8", content=b"graph", sha256="a" * 64)
ORIN = load_device("jetson-orin-nano")
TENSORRT = TensorRtLibrary("tensorrt", "10.3.0", None)
RTX = TensorRtLibrary("tensorrt-rtx", "1.7.1.116", None)


@st.composite
def keys(draw: st.DrawFn) -> EngineKey:
    low, best, high = sorted(draw(st.tuples(*[st.integers(1, 64)] * 3)))
    return a_key(
        library=draw(st.sampled_from(["tensorrt", "tensorrt-rtx"])),
        version=draw(st.sampled_from(["1.7.1.116", "10.3.0", "10.13.0.35", "11.0.0"])),
        capability=draw(st.sampled_from(["7.5", "8.7", "8.9", "12.0"])),
        graph_sha256=draw(st.sampled_from(["a" * 64, "b" * 64])),
        batch_min=low,
        batch_best=best,
        batch_max=high,
        text_length=draw(st.none() | st.integers(1, 100)),
        hardware_portability=draw(
            st.sampled_from(["none", "same-compute-capability", "ampere-plus"])
        ),
        version_portability=draw(st.booleans()),
        sparse_weights=draw(st.booleans()),
        workspace_mb=draw(st.none() | st.integers(1, 10_000)),
    )


@given(keys(), keys())
def test_names_are_equal_where_keys_are(one: EngineKey, other: EngineKey) -> None:
    assert (one.stem("text") == other.stem("text")) == (one == other)


@given(keys())
def test_name_is_a_safe_file_name_that_says_what_it_is(key: EngineKey) -> None:
    stem = key.stem("vision_int8")
    assert stem.startswith(f"vision_int8-{key.library}-{key.version}-sm")
    assert Path(stem).name == stem
    assert stem.isascii()


def test_name_is_the_same_on_every_machine() -> None:
    assert a_key().stem("vision_int8") == "vision_int8-tensorrt-10.3.0-sm87-526cee4d"


@given(keys())
def test_record_survives_json(key: EngineKey) -> None:
    record = EngineRecord(tower="image", precision="int8", path=engine_path(SOURCE, key), key=key)
    text = json.dumps(dataclasses.asdict(record))
    assert parse(EngineRecord, json.loads(text), source="test") == record


@pytest.mark.parametrize(
    "path",
    ["../a.engine", "/engines/a.engine", "engines/../a.engine", "onnx/a.engine", "engines/a.onnx"],
)
def test_record_must_lie_in_the_folder_of_engines(path: str) -> None:
    with pytest.raises(ValueError, match=r"unsafe path|an engine lies at"):
        EngineRecord(tower="image", precision="int8", path=path, key=a_key())


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "A" * 64},
        {"version": "../10"},
        {"version": ""},
        {"capability": "sm87"},
        {"batch_min": 0},
        {"batch_best": 33},
        {"text_length": 0},
        {"workspace_mb": 0},
    ],
)
def test_key_of_nonsense(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|at least"):
        a_key(**change)


def test_unknown_field_in_json() -> None:
    with pytest.raises(ConfigError, match="surprise: unknown key"):
        parse(EngineKey, dataclasses.asdict(a_key()) | {"surprise": 1}, source="test")


def test_key_of_a_device() -> None:
    device = dataclasses.replace(
        ORIN, batch_best=4, hardware_portability="ampere-plus", version_portability=True
    )
    assert EngineKey.of(SOURCE, device, TENSORRT) == a_key(
        hardware_portability="ampere-plus", version_portability=True
    )
    assert EngineKey.of(SOURCE, dataclasses.replace(ORIN, memory_mb=None), TENSORRT) == a_key(
        batch_best=1, workspace_mb=None
    )


def test_key_of_a_gpu_of_one_model() -> None:
    key = EngineKey.of(SOURCE, ORIN, TENSORRT, gpu="Orin")
    assert (key.gpu, key.architecture) == ("Orin", platform.machine())
    portable = dataclasses.replace(ORIN, hardware_portability="ampere-plus")
    assert EngineKey.of(SOURCE, portable, TENSORRT, gpu="Orin").gpu == ""


def test_rtx_engines_know_no_portability() -> None:
    key = EngineKey.of(SOURCE, load_device("rtx-a2000"), RTX, gpu="NVIDIA RTX A2000")
    assert (key.gpu, key.architecture) == ("", "")
    assert (key.hardware_portability, key.version_portability) == ("none", False)
    assert key.workspace_mb == 3000  # half, since the memory is the GPU's own


def test_device_without_gpu_has_no_engine() -> None:
    with pytest.raises(ValueError, match="capability must look like"):
        EngineKey.of(SOURCE, load_device("x86-avx2"), TENSORRT)


@given(keys())
def test_an_engine_does_for_its_own_key(key: EngineKey) -> None:
    assert key.mismatch(key) is None


@pytest.mark.parametrize(
    ("shipped", "wanted", "expected"),
    [
        ({}, {"graph_sha256": "b" * 64}, "another graph"),
        ({}, {"library": "tensorrt-rtx"}, "built for tensorrt, not tensorrt-rtx"),
        ({}, {"version": "10.3.1"}, "version 10.3.0, and 10.3.1 is installed"),
        ({"version_portability": True}, {"version": "10.3.1"}, None),
        ({"version_portability": True}, {"version": "10.13.0"}, None),
        ({"version_portability": True}, {"version": "11.0.0"}, None),
        ({"version_portability": True}, {"version": "10.2.0"}, "version 10.3.0"),
        ({"version_portability": True, "version": "11.0.0"}, {"version": "10.13.0"}, "11.0.0"),
        ({}, {"capability": "8.9"}, "capability 8.7, not 8.9"),
        ({"hardware_portability": "ampere-plus"}, {"capability": "8.9"}, None),
        ({"hardware_portability": "ampere-plus"}, {"capability": "12.0"}, None),
        ({"hardware_portability": "ampere-plus"}, {"capability": "7.5"}, "not 7.5"),
        ({"hardware_portability": "same-compute-capability"}, {"capability": "8.6"}, "not 8.6"),
        ({"gpu": "Orin"}, {"gpu": "Orin"}, None),
        ({"gpu": "NVIDIA A30"}, {"gpu": "NVIDIA A100"}, "built on NVIDIA A30, not NVIDIA A100"),
        ({"gpu": "NVIDIA A30"}, {}, None),
        ({"architecture": "x86_64"}, {"architecture": "aarch64"}, "on x86_64, not aarch64"),
        ({"batch_max": 16}, {}, "batches of 1 to 16"),
        ({"batch_min": 2}, {}, "batches of 2 to 32"),
        ({}, {"batch_max": 8}, None),
        ({"text_length": 32}, {"text_length": 77}, "texts of up to 32 tokens"),
        ({"text_length": 77}, {"text_length": 32}, None),
        ({}, {"batch_best": 8, "sparse_weights": False, "workspace_mb": 1}, None),
    ],
)
def test_where_an_engine_does(
    shipped: dict[str, Any], wanted: dict[str, Any], expected: str | None
) -> None:
    found = a_key(**shipped).mismatch(a_key(**wanted))
    if expected is None:
        assert found is None
    else:
        assert expected in str(found)


def test_rtx_engine_needs_the_exact_version() -> None:
    rtx = {"library": "tensorrt-rtx", "version_portability": True}
    older = a_key(**rtx, version="1.6.0.5").mismatch(a_key(**rtx, version="1.7.1.116"))
    assert "1.7.1.116 is installed" in str(older)


def test_hash_of_a_graph_of_several_files() -> None:
    assert graph_sha256("a" * 64) == "a" * 64
    pair = graph_sha256("a" * 64, "b" * 64)
    assert len(pair) == 64
    assert pair != graph_sha256("b" * 64, "a" * 64)


@pytest.mark.parametrize(
    "change", [{"name": "a/b"}, {"name": ""}, {"sha256": "short"}, {"text_length": 0}]
)
def test_source_of_nonsense(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "text", "content": b"", "sha256": "a" * 64}
    with pytest.raises(ValueError, match="must be"):
        GraphSource(**(fields | change))
