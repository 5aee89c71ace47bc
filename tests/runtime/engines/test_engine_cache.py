"""Engines of a bundle, of the user's cache, and new ones: which is used, kept and refused."""

import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.engine_records import EngineKey, EngineRecord, GraphSource, engine_path
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.engines.engine_cache import (
    ENTRY_VERSION,
    EngineCache,
    EngineEntry,
    OpenEngine,
    engine_cache_folder,
    find_or_build,
)
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.engines.tensorrt_build import build_engine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary
from edgeclip.runtime.errors import EngineError, EngineParityError
from edgeclip.runtime.stats.three_outcomes import Outcome
from tests.conftest import GATE
from tests.runtime.tiny_graphs import a_key

KEY = a_key()
STEM = KEY.stem("vision")
CONTENT = b"an engine" * 100
ENTRY = EngineEntry(
    schema_version=ENTRY_VERSION,
    key=KEY,
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    gates=(GATE,),
    failed="",
    seconds=1.5,
    created="2026-01-01T00:00:00+00:00",
)


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages that the cache logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("edgeclip.runtime.engines.engine_cache")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with logged() as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "deep" / "engines")


def test_what_was_kept_is_found(cache: EngineCache, said: list[str]) -> None:
    assert cache.entry(STEM, KEY) is None
    assert cache.timing(STEM) is None
    cache.write(STEM, ENTRY, content=CONTENT, timing=b"times")
    assert cache.entry(STEM, KEY) == ENTRY
    assert cache.content(STEM, ENTRY) == CONTENT
    assert cache.timing(STEM) == b"times"
    assert said == []


def test_entry_without_engine_deletes_the_old_one(cache: EngineCache) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    failed = dataclasses.replace(ENTRY, gates=(), failed="mean cosine: 0.3")
    cache.write(STEM, failed)
    assert cache.entry(STEM, KEY) == failed
    assert not cache.path(STEM).exists()


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x", b"y" + CONTENT[1:]])
def test_altered_engine_is_not_used(cache: EngineCache, said: list[str], content: bytes) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    cache.path(STEM).write_bytes(content)
    assert cache.content(STEM, ENTRY) is None
    assert f"{STEM}.engine has not the hash in {STEM}.json" in said[0]


def test_lost_engine_is_not_used(cache: EngineCache, said: list[str]) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    cache.path(STEM).unlink()
    assert cache.content(STEM, ENTRY) is None
    assert "cannot be read" in said[0]


def _set(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        _set("schema_version", ENTRY_VERSION + 1),
        _set("sha256", 5),
        _set("surprise", 1),
        _set("seconds", "long"),
        lambda data: data.pop("gates"),
        lambda data: data["key"].update(version="9.9.9"),
        lambda data: data["key"].update(batch_max=0),
        lambda data: data["gates"][0].update(value=0.5),
    ],
)
def test_altered_entry_is_not_used(
    cache: EngineCache, said: list[str], change: Callable[[dict[str, Any]], object]
) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    path = cache.path(STEM, ".json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert cache.entry(STEM, KEY) is None
    assert len(said) == 1
    assert str(path) in said[0]
    assert "\n" not in said[0]


@given(st.binary(max_size=200) | st.integers(0, 300).map(lambda size: b"[" * size))
def test_any_bytes_for_an_entry_are_no_entry(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    cache = EngineCache(tmp_path_factory.getbasetemp() / "any")
    path = cache.path(STEM, ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with logged() as said:
        assert cache.entry(STEM, KEY) is None
    assert len(said) == 1


def test_truncated_entry_is_not_used(cache: EngineCache) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    path = cache.path(STEM, ".json")
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:size])
        assert cache.entry(STEM, KEY) is None


def test_entry_of_another_key_is_not_used(cache: EngineCache, said: list[str]) -> None:
    cache.write(STEM, ENTRY, content=CONTENT)
    assert cache.entry(STEM, a_key(version="10.4.0")) is None
    assert "describes another engine than its name says" in said[0]


def test_killed_writer_leaves_nothing_that_is_taken_for_an_engine(
    cache: EngineCache, tmp_path: Path
) -> None:
    """Killed between the engine and its entry, with the entry of an older engine there."""
    cache.write(STEM, dataclasses.replace(ENTRY, sha256="0" * 64), content=b"older")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edgeclip.runtime.engines import engine_cache\n"
        "from tests.runtime.engines.test_engine_cache import CONTENT, ENTRY, STEM\n"
        "write = engine_cache._write\n"
        "def killed(path, content):\n"
        "    if path.suffix == '.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, content)\n"
        "engine_cache._write = killed\n"
        "cache = engine_cache.EngineCache(Path(sys.argv[1]))\n"
        "with cache.lock(STEM): cache.write(STEM, ENTRY, content=CONTENT)\n"
    )
    root = Path(__file__).parents[3]
    folder = cache.path(STEM).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=False)
    assert done.returncode == -9
    assert cache.path(STEM).read_bytes() == CONTENT
    assert cache.entry(STEM, KEY) is None
    with cache.lock(STEM):  # the killed process holds it no more
        cache.write(STEM, ENTRY, content=CONTENT)
    assert cache.entry(STEM, KEY) == ENTRY


def test_lock_makes_others_wait_and_say_so(cache: EngineCache, said: list[str]) -> None:
    order: list[str] = []

    def other() -> None:
        with cache.lock(STEM):
            order.append("second")

    thread = threading.Thread(target=other)
    with cache.lock(STEM):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert said == [f"another process is building {STEM}: waiting"]


def test_folder_that_cannot_be_written_is_said(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = EngineCache(tmp_path / "file")
    with cache.lock(STEM):
        cache.write(STEM, ENTRY, content=CONTENT)
    assert "cannot be kept, so the next start builds it again" in said[0]


def test_where_engines_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EDGECLIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert engine_cache_folder() == Path.home() / ".cache" / "edgeclip" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert engine_cache_folder() == Path.home() / ".cache" / "edgeclip" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_cache_folder() == tmp_path / "edgeclip" / "engines"
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "own"))
    assert engine_cache_folder() == tmp_path / "own" / "engines"


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
Find = Callable[..., Engine]


class Counter:
    """A gate that runs the engine, measures `value`, and counts how often it was asked."""

    def __init__(self, value: float = 0.999) -> None:
        self.value = value
        self.calls = 0

    def __call__(self, engine: Engine) -> tuple[GateRecord, ...]:
        self.calls += 1
        assert engine.run({"pixels": PIXELS})["image_embeds"].shape == (3, 4)
        value = self.value
        outcome: Outcome = "passed" if value >= GATE.bound else "failed"
        return (dataclasses.replace(GATE, value=value, low=value, high=value, outcome=outcome),)


class Opened:
    """Runs a graph with ONNX Runtime in place of its engine, and keeps what it was given."""

    def __init__(self, source: GraphSource) -> None:
        self._source = source
        self.contents: list[bytes] = []
        self.refused: set[bytes] = set()

    def __call__(self, content: bytes, key: EngineKey, runtime_cache: Path) -> Engine:
        if content in self.refused:
            raise EngineError("another driver")
        self.contents.append(content)
        assert isinstance(self._source.content, bytes)
        return OrtEngine(
            Path("graph.onnx"),
            providers=("CPUExecutionProvider",),
            threads=1,
            content=self._source.content,
        )


@pytest.fixture
def opened(image_source: GraphSource) -> Opened:
    return Opened(image_source)


@pytest.fixture
def find(
    rtx: TensorRtLibrary,
    ada: DeviceProfile,
    image_source: GraphSource,
    tmp_path: Path,
    opened: Opened,
) -> Find:
    """`find_or_build` for the tiny image tower, with a folder of its own."""

    def call(gate: Counter, *, library: TensorRtLibrary = rtx, **more: object) -> Engine:
        opened_by: OpenEngine = opened
        return find_or_build(
            image_source,
            device=ada,
            library=library,
            check=gate,
            folder=tmp_path / "engines",
            opened_by=opened_by,
            **more,  # type: ignore[arg-type]
        )

    return call


@pytest.fixture(scope="module")
def built(rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource) -> bytes:
    return build_engine(image_source, device=ada, library=rtx).engine


@pytest.fixture
def record(rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource) -> EngineRecord:
    key = EngineKey.of(image_source, ada, rtx)
    path = engine_path(image_source, key)
    return EngineRecord(tower="image", precision="fp32", path=path, key=key)


def files(tmp_path: Path, suffix: str) -> list[Path]:
    return sorted((tmp_path / "engines").glob(f"*{suffix}"))


def test_builds_once_then_takes_what_was_kept(
    find: Find, tmp_path: Path, said: list[str], opened: Opened, rtx: TensorRtLibrary
) -> None:
    gate = Counter()
    find(gate)
    (path,) = files(tmp_path, ".engine")
    assert said == [
        "no usable engine of vision for rtx-4000-ada in this bundle: building one with "
        f"{rtx.title}, kept in {path}"
    ]
    find(gate)
    assert gate.calls == 1
    assert len(said) == 1
    assert opened.contents == [path.read_bytes()] * 2
    entry = json.loads(path.with_suffix(".json").read_text())
    assert entry["gates"][0]["value"] == 0.999


def test_truncated_engine_is_built_anew(find: Find, tmp_path: Path, said: list[str]) -> None:
    gate = Counter()
    find(gate)
    (path,) = files(tmp_path, ".engine")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    find(gate)
    assert gate.calls == 2
    assert "has not the hash" in said[1]
    assert len(path.read_bytes()) > 100
    find(gate)
    assert gate.calls == 2


def test_altered_entry_is_built_anew(find: Find, tmp_path: Path) -> None:
    gate = Counter()
    find(gate)
    (path,) = files(tmp_path, ".json")
    path.write_text(path.read_text().replace("8.9", "8.6"))
    find(gate)
    assert gate.calls == 2


def test_other_version_has_an_engine_of_its_own(
    find: Find, tmp_path: Path, rtx: TensorRtLibrary
) -> None:
    gate = Counter()
    find(gate)
    find(gate, library=dataclasses.replace(rtx, version="1.8.0.1"))
    assert gate.calls == 2
    assert len(files(tmp_path, ".engine")) == 2


def test_kept_engine_that_no_longer_opens_is_built_anew(
    find: Find, tmp_path: Path, said: list[str], opened: Opened
) -> None:
    gate = Counter()
    find(gate)
    (path,) = files(tmp_path, ".engine")
    old = b"of an old driver"
    entry = path.with_suffix(".json")
    data = json.loads(entry.read_text())
    import hashlib

    data["sha256"] = hashlib.sha256(old).hexdigest()
    path.write_bytes(old)
    entry.write_text(json.dumps(data))
    opened.refused.add(old)
    find(gate)
    assert gate.calls == 2
    assert "cannot be used any more (another driver)" in said[1]


@pytest.mark.parametrize("value", [0.31, float("nan"), float("-inf")])
def test_engine_that_misses_its_gate_is_refused_and_not_built_again(
    find: Find, tmp_path: Path, said: list[str], value: float
) -> None:
    gate = Counter(value)
    expected = rf"mean cosine: {value:g} cosine \(bound >= 0\.99\): choose another precision"
    for _ in range(2):
        with pytest.raises(EngineParityError, match=expected):
            find(gate)
    assert gate.calls == 1
    assert files(tmp_path, ".engine") == []
    (marker,) = files(tmp_path, ".json")
    marker.unlink()
    find(Counter())
    assert len(files(tmp_path, ".engine")) == 1


def test_gate_that_cannot_run_marks_nothing(find: Find, tmp_path: Path) -> None:
    class Broken(Counter):
        def __call__(self, engine: Engine) -> tuple[GateRecord, ...]:
            raise EngineError("the GPU has too little memory")

    with pytest.raises(EngineError, match="too little memory"):
        find(Broken())
    assert files(tmp_path, ".json") == []


def test_shipped_engine_comes_first_and_is_gated_once(
    find: Find, tmp_path: Path, said: list[str], opened: Opened, record: EngineRecord, built: bytes
) -> None:
    gate = Counter()
    for _ in range(2):
        find(gate, shipped=[(record, lambda: built)])
    assert gate.calls == 1
    assert opened.contents == [built, built]
    assert said == []
    assert files(tmp_path, ".engine") == []
    find(gate, shipped=[(record, lambda: built + b"another")])
    assert gate.calls == 2


def test_shipped_engine_that_misses_its_gate_makes_way(
    find: Find, tmp_path: Path, said: list[str], record: EngineRecord, built: bytes
) -> None:
    shipped = [(record, lambda: built)]
    bad, good = Counter(0.5), Counter()

    def gate(engine: Engine) -> tuple[GateRecord, ...]:
        return bad(engine) if bad.calls == 0 else good(engine)

    for _ in range(2):
        find(gate, shipped=shipped)
    assert (bad.calls, good.calls) == (1, 1)
    assert f"{record.path} is not used, it misses mean cosine: 0.5" in said[0]
    assert len(files(tmp_path, ".engine")) == 1


def test_shipped_engine_that_does_not_open_makes_way(
    find: Find, said: list[str], opened: Opened, record: EngineRecord
) -> None:
    opened.refused.add(b"of another machine")
    find(Counter(), shipped=[(record, lambda: b"of another machine")])
    assert f"{record.path} cannot be used here (another driver)" in said[0]
    assert len(said) == 2


def test_engines_for_others_are_never_read(
    find: Find, said: list[str], record: EngineRecord
) -> None:
    def load() -> bytes:
        raise AssertionError("was read")

    other = dataclasses.replace(record.key, capability="8.6")
    find(Counter(), shipped=[(dataclasses.replace(record, key=other), load)])
    assert "(only one built for compute capability 8.6, not 8.9): building" in said[0]


def test_two_at_once_build_one(find: Find, tmp_path: Path) -> None:
    gate = Counter()
    with ThreadPoolExecutor(2) as pool:
        engines = [task.result() for task in [pool.submit(find, gate) for _ in range(2)]]
    assert len(engines) == 2
    assert gate.calls == 1
    assert len(files(tmp_path, ".json")) == 1


def test_folder_that_cannot_be_written_still_gives_an_engine(
    find: Find, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "engines").write_text("no folder")
    assert find(Counter()).run({"pixels": PIXELS})
    assert "cannot be kept" in said[-1]


def test_nothing_shipped_and_nothing_to_build_with(
    image_source: GraphSource, tmp_path: Path, opened: Opened
) -> None:
    device = dataclasses.replace(load_device("jetson-orin-nano"), compute_capability="99.9")
    with pytest.raises(EngineError, match=r"in this bundle, and none can be built here: Tens"):
        find_or_build(
            image_source,
            device=device,
            library=TensorRtLibrary("tensorrt", "10.3.0", None),
            check=Counter(),
            folder=tmp_path,
            opened_by=opened,
        )


def test_without_gpu_nothing_is_built(
    rtx: TensorRtLibrary, ada: DeviceProfile, image_source: GraphSource, tmp_path: Path
) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match=r"GPU|cuda-bindings|NVIDIA driver"):
        find_or_build(image_source, device=ada, library=rtx, check=Counter(), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
