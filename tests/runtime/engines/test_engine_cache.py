import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.engines.engine_cache import (
    ENTRY_VERSION,
    EngineCache,
    EngineEntry,
    engine_cache_folder,
)
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


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> EngineCache:
    return EngineCache(tmp_path / "deep" / "engines", said.append)


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
    assert f"{STEM}.engine is not what {STEM}.json says" in said[0]


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
    said: list[str] = []
    cache = EngineCache(tmp_path_factory.getbasetemp() / "any", said.append)
    path = cache.path(STEM, ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
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
    assert "another engine than its name says" in said[0]


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
        "cache = engine_cache.EngineCache(Path(sys.argv[1]), print)\n"
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
    cache = EngineCache(tmp_path / "file", said.append)
    with cache.lock(STEM):
        cache.write(STEM, ENTRY, content=CONTENT)
    assert "cannot be kept, so that the next start builds it anew" in said[0]


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
