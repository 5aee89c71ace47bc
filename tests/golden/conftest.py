"""The session that runs the golden cases, and what they read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden.cases import MISTAKES, RUNS
from tests.golden.session import Session

_ROOT = Path(__file__).parents[2]
_NOT_SOURCE = {"build", "dist", "runs", "tests"}
CPU = """\
name: test-cpu
description: one thread
engine: onnxruntime-cpu
precisions: [fp32]
threads: 1
memory_mb: 1000
"""
LEAST = """\
name: least
description: as little as there can be
batch_sizes: [1]
min_warmup_runs: 3
max_warmup_seconds: 0.1
repeats: 10
processes: 1
seconds_per_batch: 0.05
cold_starts: 0
roofline_seconds: 0.5
"""


def short_lines() -> list[str]:
    """Every command line that ends at once: help of all commands, the version, mistakes."""
    helps = ["--help", "--version", *(f"{name} --help" for name in MISTAKES if name != "edgeclip")]
    wrong = [f"{name} {words}" for name, words in MISTAKES.items() if name != "edgeclip"]
    return [*helps, MISTAKES["edgeclip"], *wrong]


@pytest.fixture(scope="session")
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    """The session, with all cases begun that any selected test asks for."""
    folder = tmp_path_factory.mktemp("golden")
    inputs = folder / "inputs"
    inputs.mkdir()
    (inputs / "cpu.yaml").write_text(CPU, encoding="utf-8")
    openvino = CPU.replace("test-cpu", "test-openvino").replace("runtime-cpu", "runtime-openvino")
    (inputs / "openvino.yaml").write_text(openvino, encoding="utf-8")
    (inputs / "least.yaml").write_text(LEAST, encoding="utf-8")
    (inputs / "texts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    shutil.copytree(_kept_bundle(), folder / "emoji")
    session = Session(folder, RUNS, short_lines())
    asked = {item.callspec.params.get("name") for item in _selected(request)}
    for name in RUNS:
        if name in asked:
            session.start(name)
        if name == "pretrain":  # beside the longest run
            session.start_short()
    yield session
    session.close()


def _selected(request: pytest.FixtureRequest) -> Iterator[pytest.Function]:
    for item in request.session.items:
        if item.path.parent == Path(__file__).parent and hasattr(item, "callspec"):
            assert isinstance(item, pytest.Function)
            yield item


def _kept_bundle() -> Path:
    """The bundle that the repository keeps, wherever in the source it is."""
    for top in sorted(_ROOT.iterdir()):
        if top.is_dir() and top.name not in _NOT_SOURCE and not top.name.startswith("."):
            for manifest in sorted(top.rglob("emoji_bundle/edgeclip.json")):
                return manifest.parent
    raise AssertionError("the repository keeps no emoji_bundle")
