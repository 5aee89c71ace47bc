"""The shape of the source: rooms, folders, import direction, names, pinned versions."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "profiles", "compress", "export")  # each may import those before it
# The rooms that run on a device, and all that they may need there.
DEVICE_PACKAGES = {
    "runtime": {
        "PIL",
        "annotated_types",
        "cryptography",
        "cuda",
        "google",
        "grpc",
        "httptools",
        "huggingface_hub",
        "numpy",
        "onnxruntime",
        "openvino",
        "pi_heif",
        "prometheus_client",
        "pydantic",
        "pydantic_core",
        "pylibjxl",
        "rawpy",
        "ray",
        "tensorrt",
        "tensorrt_rtx",
        "threadpoolctl",
        "tokenizers",
        "tqdm",
        "typing_extensions",
        "urllib3",
        "usearch",
        "uvicorn",
        "yaml",
        "zstandard",
    },
    "profiles": {
        "PIL",
        "annotated_types",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "mlperf_loadgen",
        "numpy",
        "onnxruntime",
        "pyarrow",
        "pydantic",
        "pynvml",
        "threadpoolctl",
        "tqdm",
        "typing_extensions",
        "yaml",
    },
}
EXTRAS_NOT_INSTALLED = {
    *("gpu", "onnxruntime-openvino", "ray", "tensorrt-rtx"),
    *("jetpack6", "jetpack7", "tensorrt-cu12", "tensorrt-cu13"),
}

SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
every_source = pytest.mark.parametrize(
    "path", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES]
)


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a module of `package` imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            found.update(_dynamic_import(node))
    return found


def _dynamic_import(call: ast.Call) -> Iterator[str]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in {"import_module", "__import__"} and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def rooms_imported(modules: set[str]) -> set[str]:
    return {parts[1] for name in modules if (parts := name.split("."))[0] == "edgeclip"}


def third_party(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"edgeclip"}


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def _modules(path: Path) -> set[str]:
    package = ".".join(("edgeclip", *path.relative_to(ROOT).parent.parts))
    return imported_modules(path.read_text(encoding="utf-8"), package)


def _arrows() -> dict[str, set[str]]:
    """Which source files each source file imports, wherever in it."""
    files = {
        ".".join(("edgeclip", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in SOURCES
    }
    found: dict[str, set[str]] = {}
    for path in files.values():
        targets = {
            files[name]
            for imported in _modules(path)
            for name in (imported, imported.rpartition(".")[0])
            if name in files
        }
        found[_relative(path)] = {_relative(target) for target in targets} - {_relative(path)}
    return found


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """A circle in a directed graph, as the nodes in their order; None if there is none."""
    sorter = TopologicalSorter(arrows)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_imports_are_found_wherever_they_hide() -> None:
    source = """
import numpy as np, os.path
from edgeclip import export
from . import spec
from ..compress.losses import affinity
def late():
    import torch.nn
    class Inner:
        from onnx import helper
importlib.import_module("transformers")
__import__("optimum")
importlib.import_module(name)
"""
    found = imported_modules(source, "edgeclip.runtime")
    assert rooms_imported(found) == {"export", "runtime", "compress"}
    assert third_party(found) == {"numpy", "torch", "onnx", "transformers", "optimum"}


def test_relative_imports_of_a_sub_package_are_resolved() -> None:
    found = imported_modules(
        "from ..spec import A\nfrom ... import export", "edgeclip.runtime.split"
    )
    assert found == {"edgeclip.runtime.spec.A", "edgeclip.export"}


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) is not None
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_sources_are_found() -> None:
    assert {_room(path) for path in SOURCES} == set(ROOMS)


@every_source
def test_imports_go_one_way(path: Path) -> None:
    room = _room(path)
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert rooms_imported(_modules(path)) <= allowed, f"{room} may import {sorted(allowed)} only"


@pytest.mark.parametrize("room", DEVICE_PACKAGES)
def test_device_rooms_need_little(room: str) -> None:
    needed = {path: third_party(_modules(path)) for path in SOURCES if _room(path) == room}
    extra = {path.name: names - DEVICE_PACKAGES[room] for path, names in needed.items()}
    assert {name: names for name, names in extra.items() if names} == {}


@every_source
def test_no_module_is_named_after_a_package_it_imports(path: Path) -> None:
    assert path.stem not in {name.split(".")[0] for name in _modules(path)}


def test_no_circle_of_files() -> None:
    assert circle(_arrows()) is None


def test_no_circle_of_folders() -> None:
    """Among the folders of a room imports go one way; files at its top are above or below."""
    folders: dict[str, set[str]] = {}
    for file, others in _arrows().items():
        for other in others:
            here, there = Path(file).parts[:-1], Path(other).parts[:-1]
            if len(here) == len(there) == 2 and here[0] == there[0] and here != there:
                folders.setdefault("/".join(here), set()).add("/".join(there))
    assert circle(folders) is None


def test_packages_in_pyproject_are_those_on_disk() -> None:
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    assert set(listed) == {".".join(("edgeclip", *folder.parts)) for folder in folders}
    assert len(listed) == len(set(listed))


def test_every_dependency_is_pinned_once() -> None:
    project = _pyproject()["project"]
    wanted = [
        *project["dependencies"],
        *(
            requirement
            for extra, requirements in project["optional-dependencies"].items()
            if extra not in EXTRAS_NOT_INSTALLED
            for requirement in requirements
        ),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [_name(line) for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert {_name(requirement) for requirement in wanted} - {"edgeclip"} <= set(pinned)
    assert len(pinned) == len(set(pinned))


def _name(requirement: str) -> str:
    """The normalised name of a package (PEP 503)."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def _pyproject() -> dict[str, dict[str, Any]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
