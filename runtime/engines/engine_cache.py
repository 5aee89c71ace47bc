"""Find, build and keep TensorRT engines: the bundle's, one cached on this machine, or a new one."""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
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
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """What is known of an engine on this machine.

    Attributes:
        schema_version: `ENTRY_VERSION` of the software that wrote it.
        key: what the engine was built from and for.
        sha256: of the engine.
        gates: bounds that it met here.
        failed: why it must not be used, such as the bounds that it missed; "" if it may be.
        seconds: how long the build took; 0 for an engine that came with a bundle.
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
    """A folder of engines, shared by all processes of a user.

    Args:
        folder: made when it is needed.
        say: told in one line why something in it cannot be used.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self._folder = folder
        self._say = say

    def path(self, stem: str, suffix: str = ENGINE_SUFFIX) -> Path:
        """Where a file of an engine lies."""
        return self._folder / f"{stem}{suffix}"

    def entry(self, stem: str, key: EngineKey) -> EngineEntry | None:
        """What is known of an engine; None if nothing is, or what is there is of no use."""
        path = self.path(stem, ".json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            entry = parse(EngineEntry, data, source=str(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, EdgeClipError) as error:
            self._say(f"{path} cannot be used ({' '.join(str(error).split())})")
            return None
        if entry.key != key:
            self._say(f"{path} is about another engine than its name says")
            return None
        return entry

    def content(self, stem: str, entry: EngineEntry) -> bytes | None:
        """The engine that an entry vouches for; None if it is not there or was altered."""
        path = self.path(stem)
        try:
            content = path.read_bytes()
        except OSError as error:
            self._say(f"{path} cannot be read ({error.strerror})")
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            self._say(f"{path} is not what {path.with_suffix('.json').name} says")
            return None
        return content

    def timing(self, stem: str) -> bytes | None:
        """The timing cache of an earlier build, if there is one."""
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
        """Keep an engine and what is known of it. A disk that refuses is said, not raised.

        Without `content` no engine is kept, and an earlier one is deleted.
        """
        path = self.path(stem)
        try:
            self.path(stem, ".json").unlink(missing_ok=True)  # it vouches for the old engine
            if content is None:
                path.unlink(missing_ok=True)
            else:
                _write(path, content)
            if timing is not None:
                _write(self.path(stem, ".timing"), timing)
            text = json.dumps(dataclasses.asdict(entry), indent=2, allow_nan=False) + "\n"
            _write(self.path(stem, ".json"), text.encode())
        except (OSError, EdgeClipError) as error:
            self._say(f"{path} cannot be kept, so that the next start builds it again ({error})")

    @contextmanager
    def lock(self, stem: str) -> Iterator[None]:
        """Keep other processes from building the same engine; a killed one lets go.

        Where files cannot be locked, two may build: what they write is still whole.
        """
        descriptor = _open_lock(self.path(stem, ".lock"))
        if descriptor is None:
            yield
            return
        try:
            _wait_for(descriptor, lambda: self._say(f"another process is building {stem}: waiting"))
            yield
        finally:
            os.close(descriptor)


def engine_cache_folder() -> Path:
    """Where engines are kept: the folder `engines` of `cache_root()`."""
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


def _wait_for(descriptor: int, say_waiting: Callable[[], None]) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say_waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks


EngineCheck = Callable[[Engine], tuple[GateRecord, ...]]
BundledEngines = Sequence[tuple[EngineRecord, Callable[[], bytes]]]
# Turns a serialized engine into one that runs; the path is for what it compiles at run time.
OpenEngine = Callable[[bytes, EngineKey, Path], Engine]


def find_or_build(
    source: GraphSource,
    *,
    device: DeviceProfile,
    library: TensorRtLibrary,
    gate: EngineCheck,
    say: Say,
    shipped: BundledEngines = (),
    folder: Path | None = None,
    opened_by: OpenEngine | None = None,
) -> Engine:
    """Open the engine of a graph, building it if need be.

    An engine of the bundle comes first, then one that was kept on this machine. Every engine
    has to pass `gate` once on the machine that runs it: one that was built where no GPU is
    has never run before. Two processes that need the same engine build it once.

    Args:
        source: the graph.
        device: where it runs.
        library: what loads and builds engines.
        gate: runs an engine and measures it against its bounds.
        say: told in one line of what takes time, and of what cannot be used.
        shipped: engines of the bundle, each with a function that reads it and checks its
            hash.
        folder: where engines are kept; `engine_cache_folder()` by default.
        opened_by: makes a running engine; `TensorRtEngine` by default.

    Raises:
        EngineError: there is no GPU, it is not the device's, or no engine can be built.
        EngineParityError: the engine that was built missed a bound, now or at an earlier try.
        MissingExtraError: cuda-bindings is not installed.
    """
    if opened_by is None:
        _check_gpu(device)
        opened_by = _opener(library)
        where = gpu_name()
    else:
        where = device.name
    cache = EngineCache(folder or engine_cache_folder(), say)
    finder = _Finder(source, device, library, gate, say, cache, opened_by, where)
    return finder.shipped(shipped) or finder.kept_or_new(shipped)


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


class _Finder:
    """One search for the engine of one graph."""

    def __init__(
        self,
        source: GraphSource,
        device: DeviceProfile,
        library: TensorRtLibrary,
        gate: EngineCheck,
        say: Say,
        cache: EngineCache,
        open_engine: OpenEngine,
        where: str,
    ) -> None:
        self._source, self._device, self._library = source, device, library
        self._gate, self._say, self._cache = gate, say, cache
        self._open, self._where = open_engine, where
        self._key = EngineKey.of(source, device, library)
        self._stem = self._key.stem(source.name)

    def shipped(self, shipped: BundledEngines) -> Engine | None:
        """The first engine of the bundle that suits and passes."""
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
                entry = _entry(record.key, sha256, self._gate(engine), seconds=0.0)
                self._cache.write(stem, entry)
                if not entry.failed:
                    return engine
            if not entry.failed:
                return self._start(content, record.key, stem)
        except EngineError as error:
            self._say(f"the bundle's {record.path} cannot be used here ({error})")
            return None
        self._say(f"the bundle's {record.path} is not used, it misses {entry.failed}")
        return None

    def kept_or_new(self, shipped: BundledEngines) -> Engine:
        """The engine that was kept, or a new one."""
        with self._cache.lock(self._stem):
            return self._kept() or self._new(shipped)

    def _kept(self) -> Engine | None:
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
            self._say(f"{self._cache.path(self._stem)} cannot be used any more ({error})")
            return None

    def _new(self, shipped: BundledEngines) -> Engine:
        path = self._cache.path(self._stem)
        obstacle = self._library.why_not_build(self._device)
        lacking = f"no usable engine of {self._source.name} for {self._where} in this bundle"
        lacking += _reasons(shipped, self._key)
        if obstacle is not None:
            raise EngineError(f"{lacking}, and none can be built here: {obstacle}")
        self._say(f"{lacking}: building one with {self._library.title}, kept in {path}")
        built = build_engine(
            self._source,
            device=self._device,
            library=self._library,
            timing_cache=self._cache.timing(self._stem),
        )
        engine = self._start(built.engine, self._key, self._stem)
        self._keep(built, self._gate(engine))
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
        gates=() if failed else gates,  # what failed may be NaN, which JSON does not have
        failed=failed,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _holds(gate: GateRecord) -> bool:
    numbers = (gate.value, gate.low, gate.high, gate.bound)
    return gate.passed and all(map(math.isfinite, numbers))


def _words(gate: GateRecord) -> str:
    """A gate in words, such as "mean cosine: 0.31 cosine (bound >= 0.99)"."""
    value = f"{gate.value:.6g} {gate.unit}".rstrip()
    return f"{gate.name}: {value} (bound {gate.direction} {gate.bound:g})"


def _reasons(shipped: BundledEngines, key: EngineKey) -> str:
    """Why the engines that the bundle has of this graph do not suit, in brackets."""
    same = [record.key for record, _ in shipped if record.key.graph_sha256 == key.graph_sha256]
    mismatches = dict.fromkeys(mismatch for known in same if (mismatch := known.mismatch(key)))
    return f" (only one {' and one '.join(mismatches)})" if mismatches else ""
