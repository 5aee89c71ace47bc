"""A cut set on disk (one tower cut in two at several points), and its heads on the device."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Outputs
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.manifest import FileRecord
from edgeclip.runtime.device.schema import check_bounds, parse
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.errors import ConfigError, EdgeClipError, EngineError, InputError
from edgeclip.runtime.spec import ImageSpec, PixelForm, Precision, Tower, plain_spec
from edgeclip.runtime.towers.tower_runner import in_batches, tower_feed

if TYPE_CHECKING:
    from edgeclip.runtime.device.device_profile import DeviceProfile

SCHEMA_VERSION = 1
CUTS_NAME = "cuts.json"
WEIGHTS_NAME = "weights.onnx_data"
PICTURES_NAME = "pictures"
CUT_TENSOR = "cut"  # output of heads and input of tails

_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_JSON_BYTES = 16 * 2**20


class CutSetError(EdgeClipError):
    """A directory that is not a whole, unaltered cut set of a known schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPoint:
    """A tensor of the tower's graph through which all information passes.

    Attributes:
        number: 0 for the pixels, then in the order of the graph.
        name: such as "after block 3".
        shape: shape for one picture, without the batch axis.
        dtype: dtype in the graph; heads and tails exchange float16 values as float32.
        axis: the channel axis in [N, *shape], for the int8 codec.
    """

    number: Annotated[int, Ge(0)]
    name: str
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float16", "float32"]
    axis: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.shape or min(self.shape) < 1 or self.axis > len(self.shape):
            raise ValueError(f"cut {self.number}: shape and axis do not fit each other")
        if (self.dtype == "uint8") is not (self.number == 0):
            raise ValueError("cut 0 and no other one is uint8")


@dataclass(frozen=True, slots=True, kw_only=True)
class CutManifest:
    """The manifest `cuts.json` of a cut set.

    Attributes:
        schema_version: `SCHEMA_VERSION` of the software that wrote it.
        bundle: name of the bundle that the tower belongs to.
        space: SHA-256 fingerprint of the embedding space.
        tower, precision: which graph was cut.
        dim: length of an embedding.
        image: how a picture is preprocessed.
        pixels: form of the graph's input.
        batch: the only batch size that the graph accepts; None if it may vary.
        needs_vnni: whether int8 is exact only on a CPU with int8 dot products.
        points: ascending by number, perhaps with gaps.
        files: all files but `cuts.json`.
    """

    schema_version: int
    bundle: str
    space: str
    tower: Literal["image"]
    precision: Precision
    dim: Annotated[int, Ge(1)]
    image: ImageSpec
    pixels: PixelForm
    batch: Annotated[int | None, Ge(1)]
    needs_vnni: bool
    points: tuple[CutPoint, ...]
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        check_bounds(self)
        if not _HEX.fullmatch(self.space):
            raise ValueError("space must be 64 lower-case hexadecimal digits")
        numbers = [point.number for point in self.points]
        if numbers[:1] != [0] or numbers != sorted(set(numbers)):
            raise ValueError("points must begin with number 0 and ascend")
        paths = [file.path for file in self.files]
        if len({path.casefold() for path in paths}) != len(paths):
            raise ValueError("a file is listed twice")
        heads = {head_file_name(number) for number in numbers if number}
        missing = sorted((heads | {tail_file_name(number) for number in numbers}) - set(paths))
        if missing:
            raise ValueError(f"files does not list {', '.join(missing)}")

    def to_json(self) -> str:
        """Return the text of `cuts.json`."""
        data = dataclasses.asdict(self) | {"image": plain_spec(self.image)}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def head_file_name(number: int) -> str:
    """Return the file name of a head."""
    return f"head_{number}.onnx"


def tail_file_name(number: int) -> str:
    """Return the file name of a tail."""
    return f"tail_{number}.onnx"


@dataclass(frozen=True, slots=True)
class CutSet:
    """An opened cut set, all of whose declared files exist unaltered."""

    path: Path
    manifest: CutManifest

    @classmethod
    def open(cls, path: str | Path) -> "CutSet":
        """Open a cut set after checking all its files; no graph is loaded.

        Raises:
            CutSetError: not a directory, no manifest of this schema, or a file that is missing,
                a symbolic link, undeclared, or of another size or SHA-256.
        """
        root = Path(path)
        if not root.is_dir():
            raise CutSetError(f"{root} is not a directory: give what `edgeclip cut` wrote")
        root = root.resolve()
        manifest = _read_manifest(root / CUTS_NAME)
        _check_tree(root, {file.path for file in manifest.files})
        for file in manifest.files:
            _check_file(root, file)
        return cls(root, manifest)

    @property
    def tower(self) -> Tower:
        """The tower that was cut."""
        return self.manifest.tower

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the cut points; the first is 0."""
        return tuple(point.number for point in self.manifest.points)

    def point(self, number: int) -> CutPoint:
        """Return a cut point.

        Raises:
            CutSetError: there is no such cut.
        """
        for point in self.manifest.points:
            if point.number == number:
                return point
        there = ", ".join(map(str, self.numbers))
        raise CutSetError(f"{self.path} has no cut {number}; it has {there}")

    def graph_bytes(self, name: str) -> bytes:
        """Read a graph and verify its hash.

        The weights that it refers to were verified when the set was opened.

        Raises:
            CutSetError: the graph is not declared, or was altered since the set was opened.
        """
        files = {file.path: file for file in self.manifest.files}
        if name not in files:
            raise CutSetError(f"{self.path} has no {name}: cut the bundle again with that point")
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise CutSetError(f"cannot read {self.path / name}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != files[name].sha256:
            raise CutSetError(_altered(self.path, name))
        return content

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The sample pictures of the cut set."""
        names = (file.path for file in self.manifest.files)
        return tuple(self.path / name for name in names if name.startswith(f"{PICTURES_NAME}/"))


def _read_manifest(path: Path) -> CutManifest:
    if path.is_symlink() or not path.is_file():
        raise CutSetError(f"{path.parent} holds no {CUTS_NAME}: give what `edgeclip cut` wrote")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CutSetError(f"{path} is too large: cut the bundle again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CutSetError(f"cannot read {path} ({error}): copy the cut set again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise CutSetError(
            f"{path} has schema version {version!r}, but this software reads {SCHEMA_VERSION}: "
            "cut the bundle again, or update edgeclip"
        )
    try:
        return parse(CutManifest, data, source=str(path))
    except ConfigError as error:
        raise CutSetError(" ".join(map(str.strip, str(error).splitlines()))) from None


def _check_tree(root: Path, declared: set[str]) -> None:
    """Raise if there is an undeclared file: a graph can refer to data files beside it."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            raise CutSetError(f"{root}: {name} is a symbolic link: copy it with links followed")
        if not path.is_dir() and name not in declared | {CUTS_NAME}:
            raise CutSetError(f"{root}: {name} is not declared in {CUTS_NAME}: remove it")


def _check_file(root: Path, file: FileRecord) -> None:
    path = root / file.path
    try:
        if not path.is_file():
            raise CutSetError(f"{root}: {file.path} is missing: copy the cut set again")
        if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
            raise CutSetError(_altered(root, file.path))
    except OSError as error:
        raise CutSetError(f"cannot read {path}: {error.strerror}") from None


def _altered(root: Path, name: str) -> str:
    return f"{root}: {name} was altered (its SHA-256 differs): copy the cut set again"


class CutHead:
    """The part of a tower before a cut.

    Attributes:
        point: the cut point.

    Raises:
        CutSetError: the set has no such cut, or was altered.
        InputError: the device does not allow the precision, or would compute it wrongly.
        EngineError: the engine cannot load the graph; TensorRT cannot load any.
        MissingExtraError: the engine's package is not installed.
    """

    def __init__(self, cuts: CutSet, number: int, device: "DeviceProfile") -> None:
        self.point = cuts.point(number)
        self._cuts = cuts
        self._most = device.batch_max
        self._engine = open_cut_graph(cuts, head_file_name(number), device) if number else None

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Compute the value at the cut; float32 [N, *point.shape], or the pixels at cut 0.

        Args:
            pixels: uint8 [N, size, size, 3], as `crop_batch` makes them.

        Raises:
            InputError: another shape or dtype.
            EngineError: the engine failed, or returned another shape or dtype.
        """
        _check_pixels(pixels, self._cuts.manifest.image.size)
        if self._engine is None:
            return pixels
        found = run_cut_graph(self._cuts, self._engine, pixels, self._most)[CUT_TENSOR]
        if found.dtype != np.float32 or found.shape[1:] != self.point.shape:
            raise EngineError(
                f"head {self.point.number} of {self._cuts.path} returned {found.dtype} "
                f"{list(found.shape)}: cut the bundle again"
            )
        return found


def tail_model_name(bundle: str, number: int) -> str:
    """Return the name of a tail as a model of the server."""
    return f"{bundle}-tail-{number}"


def open_cut_graph(cuts: CutSet, name: str, device: "DeviceProfile") -> Engine:
    """Load the graph of a head or a tail into the device's engine.

    Raises:
        InputError: the device does not allow the precision, or would compute it wrongly.
        EngineError, MissingExtraError: see `open_engine`.
    """
    precision = cuts.manifest.precision
    if precision not in device.precisions or (cuts.manifest.needs_vnni and not device.vnni):
        why = "does not allow" if precision not in device.precisions else "computes wrongly"
        raise InputError(
            f"{cuts.path} is cut in {precision}, which device {device.name!r} {why}: cut the "
            "bundle again with another --precision"
        )
    content = cuts.graph_bytes(name)
    return open_engine(cuts.path / name, device=device, content=content, data_folder=cuts.path)


def run_cut_graph(
    cuts: CutSet, engine: Engine, values: NDArray[Any], max_batch: int, *, at_cut: bool = False
) -> Outputs:
    """Run a head on pixels, or a tail on values at the cut, in batches that it accepts.

    Raises:
        EngineError: the engine failed.
    """
    manifest = cuts.manifest

    def run(part: NDArray[Any]) -> Outputs:
        if at_cut:
            return engine.run({CUT_TENSOR: part})
        return engine.run(tower_feed(part, manifest.tower, manifest.pixels, manifest.image))

    return in_batches(run, values, fixed_batch=manifest.batch, max_batch=max_batch)


def _check_pixels(pixels: NDArray[Any], size: int) -> None:
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
        raise InputError(
            f"pixels must be uint8 [N, {size}, {size}, 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    if not len(pixels):
        raise InputError("no pixels were given: a batch needs at least one picture")
