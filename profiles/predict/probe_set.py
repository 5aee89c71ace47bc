"""A set of probes on disk: small graphs whose times give the cost of each block of a tower.

```
probes.json          what each graph is, and the SHA-256 of every other file
NAME.onnx            graphs; several probes may run one graph on inputs of several lengths
weights.onnx_data    random numbers, once, which all graphs take their weights from
```

Times depend on the values of weights in one way only: equal ones are packed once and stay in the
caches. So no two weights of a graph are equal, and sharing the file saves disk space alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from edgeclip.profiles.predict.tower_shapes import BlockCount, TowerBlock
from edgeclip.runtime.bundle.files import JsonRecord, sha256_file
from edgeclip.runtime.bundle.manifest import FileRecord
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError, EdgeClipError
from edgeclip.runtime.spec import Precision

PROBES_NAME = "probes.json"
WEIGHTS_NAME = "weights.onnx_data"


class ProbeSetError(EdgeClipError):
    """A directory that is not a whole, unaltered set of probes of a known schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """A graph and the one input that it is run on.

    Attributes:
        path: path of the ONNX file in the set.
        name, dtype, shape: name, dtype and shape of the input.
        weight_bytes: what the loaded weights take.
    """

    path: str
    name: str
    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int, ...]
    weight_bytes: Annotated[int, Ge(0)]

    def __post_init__(self) -> None:
        check_bounds(self)

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Inputs by name; no time depends on their values."""
        return {self.name: np.ones(self.shape, np.dtype(self.dtype))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A graph that has some more blocks than another one.

    Attributes:
        name: unique in its set.
        precision: precision of the graph.
        graph: what is run.
        piece, count: the block, and how many of it there are more; of a stem, all that it has.
        beyond: name of the probe that it is compared with; None where there is none.
        few: one of the few that are enough to transfer costs from another device.
    """

    name: str
    precision: Precision
    graph: GraphInput
    piece: TowerBlock
    count: Annotated[int, Ge(1)] = 1
    beyond: str | None = None
    few: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTower:
    """A whole tower whose time is predicted and measured, to tell how good predictions are."""

    name: str
    precision: Precision
    graph: GraphInput
    parts: tuple[BlockCount, ...]
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeIndex(JsonRecord):
    """Index of a set of probes: `probes.json`.

    Attributes:
        created: ISO 8601 in UTC.
        command: what was typed.
        device: name of the device profile that the graphs were made for.
        needs_vnni: its int8 is for CPUs with int8 dot products.
        seed: random seed of the weights.
        probes, checks: what is measured.
        files: all files but `probes.json`.
    """

    WHAT: ClassVar[str] = "a set of probes"
    HINT: ClassVar[str] = "write it again with `edgeclip probes`"

    created: str
    command: str
    device: str
    needs_vnni: bool
    seed: int
    probes: tuple[Probe, ...]
    checks: tuple[CheckTower, ...]
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        items: tuple[Probe | CheckTower, ...] = (*self.probes, *self.checks)
        names = [item.name for item in items]
        if len(set(names)) != len(names):
            raise ValueError("two probes have the same name")
        known = {probe.name for probe in self.probes}
        lost = [probe.name for probe in self.probes if probe.beyond not in (None, *known)]
        if lost:
            raise ValueError(f"{lost[0]} is compared with a probe that is not there")
        _check_comparisons({probe.name: probe for probe in self.probes})
        files = {file.path for file in self.files}
        missing = {item.graph.path for item in items} - files
        if missing:
            raise ValueError(f"files does not list {min(missing)}")


def _check_comparisons(probes: Mapping[str, Probe]) -> None:
    """Refuse circles, and probes that may be measured without those they are compared with."""
    for probe in probes.values():
        other = None if probe.beyond is None else probes[probe.beyond]
        if other is not None and probe.few and not other.few:
            raise ValueError(f"{probe.name} is one of the few, and {other.name} before it is not")
        if other is not None and other.precision not in ("fp32", probe.precision):
            raise ValueError(
                f"{probe.name} in {probe.precision} is compared with {other.name} in "
                f"{other.precision}, which a device may not run"
            )
        seen = {probe.name}
        while other is not None:
            if other.name in seen:
                raise ValueError(f"{probe.name} is compared with others in a circle")
            seen.add(other.name)
            other = None if other.beyond is None else probes[other.beyond]


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """An opened set of probes, every file of which was there, whole and unaltered."""

    path: Path
    index: ProbeIndex

    @classmethod
    def open(cls, path: str | Path) -> "ProbeSet":
        """Check a set of probes and open it; no graph is loaded.

        Raises:
            ProbeSetError: not a directory with an index of this schema, or a file that is
                missing, a symbolic link, or of another size or SHA-256.
        """
        root = Path(path)
        if not (root / PROBES_NAME).is_file():
            raise ProbeSetError(
                f"{root} holds no {PROBES_NAME}: give the directory that `edgeclip probes` wrote"
            )
        try:
            index = ProbeIndex.load(root / PROBES_NAME)
        except ConfigError as error:
            raise ProbeSetError(" ".join(map(str.strip, str(error).splitlines()))) from None
        for file in index.files:
            _check_file(root, file)
        return cls(root.resolve(), index)

    def graph_path(self, graph: GraphInput) -> Path:
        """Return the path of a graph in the set."""
        return self.path / graph.path


def _check_file(root: Path, file: FileRecord) -> None:
    path = root / file.path
    if path.is_symlink() or not path.is_file():
        raise ProbeSetError(f"{root}: {file.path} is missing or a link: copy the probes again")
    if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
        raise ProbeSetError(
            f"{root}: {file.path} was altered (its SHA-256 differs): copy the probes again"
        )
