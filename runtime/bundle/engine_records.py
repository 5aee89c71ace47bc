"""TensorRT engines: the key that identifies an engine, its file name, and where it may run."""

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from edgeclip.runtime.bundle.files import check_path
from edgeclip.runtime.device.device_profile import DeviceProfile, Portability
from edgeclip.runtime.spec import Precision, Tower

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_FOLDER = "engines"
ENGINE_SUFFIX = ".engine"
_HEX = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d+(\.\d+)*[0-9a-z.+]*")
_CAPABILITY = re.compile(r"([1-9]\d?)\.(\d)")
_NAME = re.compile(r"[a-z0-9_]+")
_FIRST_AMPERE = (8, 0)
_SHORT_HASH = 8


class InstalledLibrary(Protocol):
    """Name and version of an installed TensorRT (see `TensorRtLibrary`)."""

    @property
    def name(self) -> LibraryName:
        """Name of the package: "tensorrt" or "tensorrt-rtx"."""
        ...

    @property
    def version(self) -> str:
        """Version of the package, such as "10.3.0"."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSource:
    """An ONNX graph to build engines from.

    Attributes:
        name: a short name for files, such as "vision_int8".
        content: the graph, or the path of its file if its weights are in a file beside it.
        sha256: SHA-256 of the graph and its weights (see `graph_sha256`).
        text_length: the most tokens of one text; None for an image tower.

    Raises:
        ValueError: an invalid name or hash, or a length below 1.
    """

    name: str
    content: bytes | Path
    sha256: str
    text_length: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be of a to z, 0 to 9 and _, got {self.name!r}")
        _check_hash("sha256", self.sha256)
        if self.text_length is not None and self.text_length < 1:
            raise ValueError("text_length must be at least 1")


def graph_sha256(*files: str) -> str:
    """Return the hash of a graph from its files' hashes: the ONNX file's, then its data files'."""
    if len(files) == 1:
        return files[0]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """All settings that distinguish one engine from another.

    Attributes:
        library: "tensorrt" or "tensorrt-rtx".
        version: version of that library.
        capability: compute capability that it was built for, such as "8.9".
        graph_sha256: SHA-256 of the graph.
        batch_min: the smallest batch that it accepts.
        batch_best: the batch that it is tuned for.
        batch_max: the largest batch that it accepts.
        text_length: the most tokens of one text that it accepts; None for an image tower.
        hardware_portability: which other GPUs it runs on.
        version_portability: whether it runs on later versions of the library too.
        sparse_weights: whether 2:4 sparse kernels were allowed.
        workspace_mb: limit of GPU memory for intermediate results, MB of 10^6 bytes; None
            for no limit.
        gpu: the GPU's model where only that one can use it well: TensorRT measures its kernels on
            it, and advises against others of the same capability. Empty for others.
        architecture: of the processor beside it, such as "aarch64"; empty where it does not matter.

    Raises:
        ValueError: fields that are out of range or contradict each other.
    """

    library: LibraryName
    version: str
    capability: str
    graph_sha256: str
    batch_min: int
    batch_best: int
    batch_max: int
    text_length: int | None
    hardware_portability: Portability
    version_portability: bool
    sparse_weights: bool
    workspace_mb: int | None
    gpu: str = ""
    architecture: str = ""

    def __post_init__(self) -> None:
        _check_hash("graph_sha256", self.graph_sha256)
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"version must look like '10.3.0', got {self.version!r}")
        if not _CAPABILITY.fullmatch(self.capability):
            raise ValueError(f"capability must look like '8.7', got {self.capability!r}")
        if not 1 <= self.batch_min <= self.batch_best <= self.batch_max:
            raise ValueError("batch sizes must be at least 1 and in rising order")
        if any(value is not None and value < 1 for value in (self.text_length, self.workspace_mb)):
            raise ValueError("text_length and workspace_mb must be at least 1")

    @classmethod
    def of(
        cls,
        source: GraphSource,
        device: DeviceProfile,
        library: InstalledLibrary,
        *,
        gpu: str = "",
    ) -> "EngineKey":
        """Return the key of the engine that a device needs, where `gpu` is the model of its GPU.

        TensorRT for RTX has no portability settings: its engines run on every GPU of their
        compute capability, and only on the version that built them.

        Raises:
            ValueError: the device has no compute capability.
        """
        portable = library.name == "tensorrt"
        return cls(
            library=library.name,
            version=library.version,
            capability=device.compute_capability or "",
            graph_sha256=source.sha256,
            batch_min=device.batch_min,
            batch_best=device.batch_best,
            batch_max=device.batch_max,
            text_length=source.text_length,
            hardware_portability=device.hardware_portability if portable else "none",
            version_portability=device.version_portability and portable,
            sparse_weights=device.structured_sparsity,
            workspace_mb=_workspace(device),
            gpu=gpu if portable and device.hardware_portability == "none" else "",
            architecture=platform.machine() if portable and gpu else "",
        )

    def stem(self, name: str) -> str:
        """Return the file name without suffix, different for every key.

        Such as "vision_int8-tensorrt-rtx-1.7.1.116-sm89-1a2b3c4d".
        """
        text = json.dumps(asdict(self), sort_keys=True)
        short = hashlib.sha256(text.encode()).hexdigest()[:_SHORT_HASH]
        return f"{name}-{self.library}-{self.version}-{sm(self.capability)}-{short}"

    def mismatch(self, wanted: "EngineKey") -> str | None:
        """Return why an engine of this key cannot serve for key `wanted`; None if it can.

        A portable engine may come from an older version or be built for another GPU.
        """
        if self.graph_sha256 != wanted.graph_sha256:
            return "built from another graph"
        if self.library != wanted.library:
            return f"built for {self.library}, not {wanted.library}"
        if not self._runs_on_version(wanted.version):
            return f"built by version {self.version}, and {wanted.version} is installed"
        if not self._runs_on_capability(wanted.capability):
            return f"built for compute capability {self.capability}, not {wanted.capability}"
        for own, theirs in ((self.gpu, wanted.gpu), (self.architecture, wanted.architecture)):
            if own and theirs and own != theirs:
                return f"built on {own}, not {theirs}"
        if not self.batch_min <= wanted.batch_min <= wanted.batch_max <= self.batch_max:
            return f"built for batches of {self.batch_min} to {self.batch_max}"
        if (self.text_length or 0) < (wanted.text_length or 0):
            return f"built for texts of up to {self.text_length} tokens"
        return None

    def _runs_on_version(self, installed: str) -> bool:
        if self.version == installed:
            return True
        newer = _numbers(installed) > _numbers(self.version)
        return self.library == "tensorrt" and self.version_portability and newer

    def _runs_on_capability(self, capability: str) -> bool:
        if self.capability == capability:
            return True
        both = min(_numbers(self.capability), _numbers(capability))
        return self.hardware_portability == "ampere-plus" and both >= _FIRST_AMPERE


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """An engine in a bundle.

    Attributes:
        tower: the tower that it computes.
        precision: precision of the graph that it was built from.
        path: POSIX path in the bundle, under engines/; its size and hash are in
            `Manifest.files`.
        key: graph, library and GPU that it was built for.

    Raises:
        ValueError: an unsafe path, or not the path of an engine.
    """

    tower: Tower
    precision: Precision
    path: str
    key: EngineKey

    def __post_init__(self) -> None:
        check_path(self.path)
        if not self.path.startswith(f"{ENGINE_FOLDER}/") or not self.path.endswith(ENGINE_SUFFIX):
            raise ValueError(f"{self.path}: an engine lies at {ENGINE_FOLDER}/NAME{ENGINE_SUFFIX}")


def engine_path(source: GraphSource, key: EngineKey) -> str:
    """Return the path of an engine in a bundle."""
    return f"{ENGINE_FOLDER}/{key.stem(source.name)}{ENGINE_SUFFIX}"


def _workspace(device: DeviceProfile) -> int | None:
    """Return half of the GPU's memory in MB, or a quarter if the CPU shares it."""
    if device.memory_mb is None:
        return None
    return max(device.memory_mb // (4 if device.shared_memory else 2), 1)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _check_hash(name: str, value: str) -> None:
    if not _HEX.fullmatch(value):
        raise ValueError(f"{name} must be 64 lower-case hexadecimal digits")


def sm(capability: str) -> str:
    """Return NVIDIA's short name of a compute capability: "sm89" for "8.9"."""
    return "sm" + capability.replace(".", "")
