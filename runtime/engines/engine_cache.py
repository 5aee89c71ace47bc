"""Open the TensorRT engine of a graph: from the bundle, from this machine's cache, or built now."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from edgeclip.runtime.bundle.engine_records import (
    ENGINE_FOLDER,
    ENGINE_SUFFIX,
    EngineKey,
    EngineRecord,
    GraphSource,
)
from edgeclip.runtime.bundle.files import atomic_file, cache_root
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.engines.tensorrt_build import BuiltEngine, build_engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import TensorRtLibrary, gpu_capability, gpu_name
from edgeclip.runtime.errors import EdgeClipError, EngineError, EngineParityError

ENTRY_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """The record of an engine in this machine's cache.

    Attributes:
        schema_version: `ENTRY_VERSION` of the software that wrote it.
        key: graph, library and GPU that the engine was built for.
        sha256: SHA-256 of the engine.
        gates: gates that it passed on this machine.
        failed: why it must not be used, such as the gates that it missed; "" if it may be.
        seconds: duration of the build; 0 for an engine that came with a bundle.
        created: ISO 8601, UTC.
    """

    schema_version: int
    key: EngineKey
    sha256: str
    gates: tuple[GateRecord, ...]
    failed: str
    seconds: float
    created: str

    def __post_init__(self) -> None:
        if self.schema_version != ENTRY_VERSION:
            raise ValueError(f"schema_version must be {ENTRY_VERSION}")


class EngineCache:
    """A folder of engines, shared by all processes of a user; it is created when needed.

    A damaged or unwritable file is logged as a warning, not raised: the engine is built again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, stem: str, suffix: str = ENGINE_SUFFIX) -> Path:
        """Return the path of a file of an engine."""
        return self._folder / f"{stem}{suffix}"

    def entry(self, stem: str, key: EngineKey) -> EngineEntry | None:
        """Read the record of an engine; None if there is none, or it is damaged."""
        path = self.path(stem, ".json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            entry = parse(EngineEntry, data, source=str(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, EdgeClipError) as error:
            _log.warning("%s cannot be used (%s)", path, " ".join(str(error).split()))
            return None
        if entry.key != key:
            _log.warning("%s describes another engine than its name says", path)
            return None
        return entry

    def content(self, stem: str, entry: EngineEntry) -> bytes | None:
        """Read an engine and check its hash; None if it is missing or was altered."""
        path = self.path(stem)
        try:
            content = path.read_bytes()
        except OSError as error:
            _log.warning("%s cannot be read (%s)", path, error.strerror)
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            _log.warning("%s has not the hash in %s", path, path.with_suffix(".json").name)
            return None
        return content

    def timing(self, stem: str) -> bytes | None:
        """Read TensorRT's timing cache of an earlier build, if there is one."""
        try:
            return self.path(stem, ".timing").read_bytes()
        except OSError:
            return None

    def write(
        self,
        stem: str,
        entry: EngineEntry,
        *,
        content: bytes | None = None,
        timing: bytes | None = None,
    ) -> None:
        """Write an engine and its record; log a failed write as a warning.

        Without `content`, only the record is written, and an earlier engine is deleted.
        """
        path = self.path(stem)
        try:
            self.path(stem, ".json").unlink(missing_ok=True)  # it describes the old engine
            if content is None:
                path.unlink(missing_ok=True)
            else:
                _write(path, content)
            if timing is not None:
                _write(self.path(stem, ".timing"), timing)
            text = json.dumps(dataclasses.asdict(entry), indent=2, allow_nan=False) + "\n"
            _write(self.path(stem, ".json"), text.encode())
        except (OSError, EdgeClipError) as error:
            _log.warning("%s cannot be kept, so the next start builds it again (%s)", path, error)

    @contextmanager
    def lock(self, stem: str) -> Iterator[None]:
        """Keep other processes from building the same engine; the lock of a killed one is freed.

        Where files cannot be locked, two processes may build; writes are atomic anyway.
        """
        descriptor = _open_lock(self.path(stem, ".lock"))
        if descriptor is None:
            yield
            return
        try:
            _wait_for_lock(descriptor, stem)
            yield
        finally:
            os.close(descriptor)


def engine_cache_folder() -> Path:
    """Return the folder of the engine cache: `engines` in `cache_root()`."""
    return cache_root() / ENGINE_FOLDER


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def _open_lock(path: Path) -> int | None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None


def _wait_for_lock(descriptor: int, stem: str) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("another process is building %s: waiting", stem)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks


EngineCheck = Callable[[Engine], tuple[GateRecord, ...]]
BundledEngines = Sequence[tuple[EngineRecord, Callable[[], bytes]]]
# Loads a serialized engine; the path is a file for the kernels that it compiles at run time.
OpenEngine = Callable[[bytes, EngineKey, Path], Engine]


def find_or_build(
    source: GraphSource,
    *,
    device: DeviceProfile,
    library: TensorRtLibrary,
    check: EngineCheck,
    shipped: BundledEngines = (),
    folder: Path | None = None,
    opened_by: OpenEngine | None = None,
) -> Engine:
    """Open the engine of a graph, building it if necessary.

    An engine of the bundle is tried first, then one in the cache. Every engine must pass
    `check` once on the machine that runs it: an engine that was built on a machine without a
    GPU has never run before. Two processes that need the same engine build it once.

    Args:
        source: the graph.
        device: where it runs.
        library: loads and builds engines.
        check: runs an engine and measures it against its bounds.
        shipped: engines of the bundle, each with a function that reads it and checks its
            hash.
        folder: the cache; `engine_cache_folder()` by default.
        opened_by: loads a serialized engine; `TensorRtEngine` by default.

    Raises:
        EngineError: there is no GPU, it is not the device's, or no engine can be built.
        EngineParityError: the engine that was built missed a gate, now or in an earlier run.
        MissingExtraError: cuda-bindings is not installed.
    """
    if opened_by is None:
        _check_gpu(device)
        opened_by = _opener(library)
        where = gpu = gpu_name()
    else:
        where, gpu = device.name, ""
    cache = EngineCache(folder or engine_cache_folder())
    key = EngineKey.of(source, device, library, gpu=gpu)
    search = _EngineSearch(source, key, device, library, check, cache, opened_by, where)
    return search.in_bundle(shipped) or search.in_cache_or_build(shipped)


def _check_gpu(device: DeviceProfile) -> None:
    found = gpu_capability()
    if found != device.compute_capability:
        raise EngineError(
            f"device {device.name!r} has compute capability {device.compute_capability}, but "
            f"{gpu_name()} has {found}: choose the device that fits, or set it in its YAML file"
        )


def _opener(library: TensorRtLibrary) -> OpenEngine:
    def open_engine(content: bytes, key: EngineKey, runtime_cache: Path) -> Engine:
        return TensorRtEngine(
            content,
            library=library,
            source=runtime_cache.stem,
            host_code=key.version_portability,
            runtime_cache=runtime_cache if library.name == "tensorrt-rtx" else None,
        )

    return open_engine


class _EngineSearch:
    """The search for the engine of one graph on one machine."""

    def __init__(
        self,
        source: GraphSource,
        key: EngineKey,
        device: DeviceProfile,
        library: TensorRtLibrary,
        check: EngineCheck,
        cache: EngineCache,
        open_engine: OpenEngine,
        where: str,
    ) -> None:
        self._source, self._device, self._library = source, device, library
        self._check, self._cache = check, cache
        self._open, self._where = open_engine, where
        self._key = key
        self._stem = key.stem(source.name)

    def in_bundle(self, shipped: BundledEngines) -> Engine | None:
        """Open the first engine of the bundle that runs here and passes the gate."""
        for record, load in shipped:
            if record.key.mismatch(self._key) is None:
                engine = self._try_shipped(record, load)
                if engine is not None:
                    return engine
        return None

    def _try_shipped(self, record: EngineRecord, load: Callable[[], bytes]) -> Engine | None:
        stem = record.key.stem(self._source.name) + "-shipped"
        content = load()
        sha256 = hashlib.sha256(content).hexdigest()
        entry = self._cache.entry(stem, record.key)
        try:
            if entry is None or entry.sha256 != sha256:
                engine = self._start(content, record.key, stem)
                entry = _entry(record.key, sha256, self._check(engine), seconds=0.0)
                self._cache.write(stem, entry)
                if not entry.failed:
                    return engine
            if not entry.failed:
                return self._start(content, record.key, stem)
        except EngineError as error:
            _log.warning("the bundle's %s cannot be used here (%s)", record.path, error)
            return None
        _log.warning("the bundle's %s is not used, it misses %s", record.path, entry.failed)
        return None

    def in_cache_or_build(self, shipped: BundledEngines) -> Engine:
        """Open the engine in the cache, or build one."""
        with self._cache.lock(self._stem):
            return self._in_cache() or self._build(shipped)

    def _in_cache(self) -> Engine | None:
        entry = self._cache.entry(self._stem, self._key)
        if entry is None:
            return None
        if entry.failed:
            raise self._parity_error(entry)
        content = self._cache.content(self._stem, entry)
        if content is None:
            return None
        try:
            return self._start(content, self._key, self._stem)
        except EngineError as error:
            path = self._cache.path(self._stem)
            _log.warning("%s cannot be used any more (%s)", path, error)
            return None

    def _build(self, shipped: BundledEngines) -> Engine:
        path = self._cache.path(self._stem)
        obstacle = self._library.why_not_build(self._device)
        lacking = f"no usable engine of {self._source.name} for {self._where} in this bundle"
        lacking += _reasons(shipped, self._key)
        if obstacle is not None:
            raise EngineError(f"{lacking}, and none can be built here: {obstacle}")
        _log.info("%s: building one with %s, kept in %s", lacking, self._library.title, path)
        built = build_engine(
            self._source,
            device=self._device,
            library=self._library,
            timing_cache=self._cache.timing(self._stem),
        )
        engine = self._start(built.engine, self._key, self._stem)
        self._keep(built, self._check(engine))
        return engine

    def _keep(self, built: BuiltEngine, gates: tuple[GateRecord, ...]) -> None:
        sha256 = hashlib.sha256(built.engine).hexdigest()
        entry = _entry(self._key, sha256, gates, seconds=built.seconds)
        content = None if entry.failed else built.engine
        self._cache.write(self._stem, entry, content=content, timing=built.timing_cache)
        if entry.failed:
            raise self._parity_error(entry)

    def _start(self, content: bytes, key: EngineKey, stem: str) -> Engine:
        return self._open(content, key, self._cache.path(stem, ".runtime-cache"))

    def _parity_error(self, entry: EngineEntry) -> EngineParityError:
        marker = self._cache.path(self._stem, ".json")
        return EngineParityError(
            f"the engine of {self._source.name} that {self._library.title} built for "
            f"{self._where} misses {entry.failed}: choose another precision (delete {marker} "
            "to build it again)"
        )


def _entry(
    key: EngineKey, sha256: str, gates: tuple[GateRecord, ...], *, seconds: float
) -> EngineEntry:
    failed = "; ".join(_words(gate) for gate in gates if not _holds(gate))
    return EngineEntry(
        schema_version=ENTRY_VERSION,
        key=key,
        sha256=sha256,
        gates=() if failed else gates,  # a failed value may be NaN, which JSON cannot hold
        failed=failed,
        seconds=seconds,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _holds(gate: GateRecord) -> bool:
    numbers = (gate.value, gate.low, gate.high, gate.bound)
    return gate.passed and all(map(math.isfinite, numbers))


def _words(gate: GateRecord) -> str:
    """Describe a gate: "mean cosine: 0.31 cosine (bound >= 0.99)"."""
    value = f"{gate.value:.6g} {gate.unit}".rstrip()
    return f"{gate.name}: {value} (bound {gate.direction} {gate.bound:g})"


def _reasons(shipped: BundledEngines, key: EngineKey) -> str:
    """Say in brackets why the bundle's engines of this graph cannot be used."""
    same = [record.key for record, _ in shipped if record.key.graph_sha256 == key.graph_sha256]
    mismatches = dict.fromkeys(mismatch for known in same if (mismatch := known.mismatch(key)))
    return f" (only one {' and one '.join(mismatches)})" if mismatches else ""
