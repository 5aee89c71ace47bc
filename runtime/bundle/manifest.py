"""The manifest of a bundle: the content of `edgeclip.json` as frozen dataclasses."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeclip.runtime.bundle.engine_records import EngineRecord
from edgeclip.runtime.bundle.files import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    check_path,
    json_fields,
    labels_path,
)
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Form
from edgeclip.runtime.console import columns, interval_ends, plain_text
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import BundleError, ConfigError
from edgeclip.runtime.spec import EncoderSpec, PixelForm, Precision, Tower, plain_spec
from edgeclip.runtime.stats.interval import HighEnd, Interval, LowEnd
from edgeclip.runtime.stats.three_outcomes import Direction, Outcome

SCHEMA_VERSION = 4
# Gates between a student and its teacher, on pairs that the student never saw.
COSINE_TO_TEACHER = "mean cosine to the teacher"
P1_COSINE_TO_TEACHER = "1st-percentile cosine to the teacher"
R1_KEPT = "R@1 kept of the teacher's"
_HEX = re.compile(r"[0-9a-f]{64}")
_ROUNDING = 1e-9  # of a bound, or of 1 for small ones


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the bundle: POSIX path relative to it, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.bytes < 0:
            raise ValueError(f"{self.path}: a size cannot be negative")
        if not _HEX.fullmatch(self.sha256):
            raise ValueError(f"{self.path}: sha256 must be 64 lower-case hexadecimal digits")


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The data of a measurement: a readable name, the number of items, and their identity.

    `sha256` identifies the items: it changes whenever any of them does.
    """

    name: str
    count: int
    sha256: str

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.name}: nothing can be measured on {self.count} items")
        if not _HEX.fullmatch(self.sha256):
            raise ValueError(f"{self.name}: sha256 must be 64 lower-case hexadecimal digits")


def keeps_bound(value: float, direction: Direction, bound: float) -> bool:
    """Return whether a measured value keeps a bound; rounding alone does not miss it.

    A loss of 3 pairs of 300 is 1 point, and in floating point can be 1.0000000000000142.
    """
    if math.isclose(value, bound, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        return True
    return value >= bound if direction == ">=" else value <= bound


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRecord:
    """A quality gate: a bound, the value measured against it, and the outcome.

    Attributes:
        name: what was measured.
        value: the measured value.
        low, high: its confidence interval; both equal to `value` where the gate is about the
            measured items themselves and not about what they were drawn from.
        bound: the bound.
        direction: reads "value >= bound" or "value <= bound".
        unit: of value and bound.
        outcome: "passed" if the whole interval keeps the bound, "failed" if it was shown to miss
            it, else "undecided".
        data: what it was measured on; None for a gate that a device measures itself on the
            bundle's golden inputs.
        confidence: of the interval; 1 where the gate is about the items themselves.

    Raises:
        ValueError: an outcome that the interval does not show, or a value outside of it.
    """

    name: str
    value: float
    low: LowEnd
    high: HighEnd
    bound: float
    direction: Direction
    unit: str
    outcome: Outcome
    data: DataRecord | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.value < self.low or self.value > self.high:
            raise ValueError(f"gate {self.name!r} records a value outside of its interval")
        near, far = (self.low, self.high) if self.direction == ">=" else (self.high, self.low)
        if self.outcome == "passed" and not keeps_bound(near, self.direction, self.bound):
            raise ValueError(
                f"gate {self.name!r} is recorded as passed, but its interval misses it"
            )
        if self.outcome == "failed" and keeps_bound(far, self.direction, self.bound):
            raise ValueError(
                f"gate {self.name!r} is recorded as failed, but its interval may keep it"
            )

    @property
    def interval(self) -> Interval:
        """The value and its interval."""
        return Interval(self.value, self.low, self.high)

    @property
    def passed(self) -> bool:
        """Whether the bound was shown to hold."""
        return self.outcome == "passed"

    @property
    def is_inside(self) -> bool:
        """Whether the measured value itself keeps the bound, which shows nothing of others."""
        return keeps_bound(self.value, self.direction, self.bound)


@dataclass(frozen=True, slots=True)
class GateRemark:
    """A caveat about a gate, such as that it could not be judged, or on too few items.

    `subject` is "bundle", or tower and precision such as "image int8"; `says` is the caveat.
    """

    subject: str
    gate: str
    says: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.gate}: {self.says}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a file was made from the fp32 graph.

    Attributes:
        says: a description in a few words.
        config: all settings as plain data, which `edgeclip export` can read.
    """

    says: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFile:
    """One tower in one precision, with its measured gates and latency.

    Attributes:
        path: the ONNX file; its size and hash are in `Manifest.files`.
        pixels: input form of an image tower; None for a text tower.
        batch: the only batch size that the graph accepts; None if it may vary.
        data_path: the file with the weights of a graph over 2 GB; None if they are in the
            ONNX file.
        gates: gates that this tower passed in this precision.
        latency_ms: median of one call at batch 1 on `Manifest.measured_on`; None if not measured.
        golden_tolerance: largest absolute difference of one embedding value from
            `golden.npz` that `edgeclip verify` accepts.
        needs_vnni: int8 with 8-bit weights for a CPU, exact only with int8 dot products.
        recipe: how it was made; None for fp32, and if it was not recorded.
    """

    path: str
    precision: Precision
    gates: tuple[GateRecord, ...]
    latency_ms: float | None
    golden_tolerance: float
    pixels: PixelForm | None = None
    batch: int | None = None
    data_path: str | None = None
    needs_vnni: bool = False
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.data_path is not None:
            check_path(self.data_path)
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"{self.path}: batch must be at least 1")
        if not 0 < self.golden_tolerance < 2:
            raise ValueError(f"{self.path}: golden_tolerance must lie between 0 and 2")


@dataclass(frozen=True, slots=True)
class TowerManifest:
    """The precisions of one tower in the bundle, and the one to use by default."""

    tower: Tower
    chosen: Precision
    files: tuple[TowerFile, ...]

    def __post_init__(self) -> None:
        if len(set(self.precisions)) != len(self.files):
            raise ValueError(f"{self.tower} tower: a precision is listed twice")
        if self.chosen not in self.precisions:
            raise ValueError(f"{self.tower} tower: the chosen {self.chosen} is not in the bundle")
        if any((file.pixels is None) is (self.tower == "image") for file in self.files):
            raise ValueError(f"{self.tower} tower: pixels is for image towers, and needed there")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions in the bundle, in the order of `files`."""
        return tuple(file.precision for file in self.files)

    def file(self, precision: Precision | None = None) -> TowerFile:
        """Return the file of a precision, by default the chosen one.

        Raises:
            BundleError: the bundle does not hold that precision.
        """
        wanted = precision or self.chosen
        for file in self.files:
            if file.precision == wanted:
                return file
        raise BundleError(
            f"the bundle has no {wanted} {self.tower} tower; it has {', '.join(self.precisions)}"
        )


@dataclass(frozen=True, slots=True)
class ReducedForm:
    """A form of reduced embeddings that the bundle gives, and the gate that it passed."""

    form: Form
    gates: tuple[GateRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a bundle comes from: `created` in ISO 8601 UTC, `versions` as (package, version)."""

    teacher: str
    student: str
    data: str
    command: str
    created: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `edgeclip.json`.

    Attributes:
        schema_version: `SCHEMA_VERSION` of the software that wrote it.
        name: name of the model.
        space: SHA-256 fingerprint of the embedding space: the teacher's if `held_to_teacher`, else
            the bundle's own. A bundle from before there were such gates says the teacher's.
        spec: input contract and embedding size.
        towers: image, and text if the bundle can embed texts, once each.
        gates: gates that both towers passed together, such as the loss of R@1.
        measured_on: machine and engine of every latency, empty if none was measured.
        provenance: teacher, student, data, command, time, versions.
        licence: SPDX identifier or a sentence.
        files: every file of the bundle except `edgeclip.json` itself.
        patch_features: the image towers also output the last hidden state of each patch.
        label_head: name of the label set built into the image towers, if any.
        engines: TensorRT engines that were built ahead of time.
        remarks: caveats about gates, such as one that could not be judged.
        reduced: the forms of shorter or coarser embeddings; their axes are in `basis.npz`.
    """

    schema_version: int
    name: str
    space: str
    spec: EncoderSpec
    towers: tuple[TowerManifest, ...]
    gates: tuple[GateRecord, ...]
    measured_on: str
    provenance: Provenance
    licence: str
    files: tuple[FileRecord, ...]
    patch_features: bool = False
    label_head: str | None = None
    engines: tuple[EngineRecord, ...] = ()
    remarks: tuple[GateRemark, ...] = ()
    reduced: tuple[ReducedForm, ...] = ()

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.space):
            raise ValueError("space must be 64 lower-case hexadecimal digits")
        if sorted(item.tower for item in self.towers) not in (["image"], ["image", "text"]):
            raise ValueError("towers must be image and text, once each, or image alone")
        paths = [file.path for file in self.files]
        # Compared without case, as some file systems do.
        if len({path.casefold() for path in paths}) != len(paths):
            raise ValueError("a file is listed twice")
        graphs = [file for item in self.towers for file in item.files]
        needed = [file.path for file in graphs]
        needed += [file.data_path for file in graphs if file.data_path is not None]
        needed += [engine.path for engine in self.engines]
        needed += [] if self.label_head is None else [labels_path(self.label_head)]
        needed += [TOKENIZER_NAME] if self.has("text") else []
        needed += [BASIS_NAME] if self.reduced else []
        if any(item.form.length > self.spec.dim for item in self.reduced):
            raise ValueError(f"embeddings of {self.spec.dim} numbers cannot be reduced to more")
        missing = sorted({*needed, GOLDEN_NAME} - set(paths))
        if missing:
            raise ValueError(f"files does not list {', '.join(missing)}")

    def has(self, tower: Tower) -> bool:
        """Return whether the bundle contains that tower."""
        return any(item.tower == tower for item in self.towers)

    def tower(self, tower: Tower) -> TowerManifest:
        """Return the entry of one tower.

        Raises:
            BundleError: the bundle was exported without it.
        """
        for item in self.towers:
            if item.tower == tower:
                return item
        raise BundleError(
            f"the bundle {self.name} has no {tower} tower: export it without --no-text to have it"
        )

    def all_gates(self) -> Iterable[tuple[str, GateRecord]]:
        """Yield every gate with its subject, such as "image int8" or "bundle"."""
        for item in self.towers:
            for file in item.files:
                yield from ((f"{item.tower} {file.precision}", gate) for gate in file.gates)
        yield from (("bundle", gate) for gate in self.gates)
        yield from ((str(item.form), gate) for item in self.reduced for gate in item.gates)

    @property
    def held_to_teacher(self) -> bool:
        """Whether gates held the towers against the teacher whose space they are in."""
        return any(gate.name == COSINE_TO_TEACHER for _, gate in self.all_gates())

    def recipes(self) -> Iterable[tuple[str, Recipe]]:
        """Yield every recorded recipe with its subject, such as "image int8"."""
        for item in self.towers:
            for file in item.files:
                if file.recipe is not None:
                    yield f"{item.tower} {file.precision}", file.recipe

    def to_json(self) -> str:
        """Return the text of `edgeclip.json`, which `from_json` reads back."""
        data = dataclasses.asdict(self, dict_factory=json_fields)
        data["spec"] = plain_spec(self.spec)
        if not self.reduced:  # so that older releases, which do not know it, read the rest
            del data["reduced"]
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = MANIFEST_NAME) -> "Manifest":
        """Read a manifest, checking its schema version before anything else.

        Raises:
            BundleError: not JSON, another schema version, a duplicate or unknown key, a wrong
                type, an unsafe path, or parts that contradict each other.
        """
        twice: list[str] = []
        data = _read_json(text, source, twice)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int or version != SCHEMA_VERSION:
            raise BundleError(_wrong_version(source, version))
        if twice:
            raise BundleError(f"{source} names a key twice: {', '.join(twice)}")
        try:
            return parse(cls, data, source=source)
        except ConfigError as error:
            head, *rest = str(error).splitlines()
            raise BundleError(" ".join([head, "; ".join(map(str.strip, rest))]).strip()) from None


def _read_json(text: str, source: str, twice: list[str]) -> object:
    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in items:
            if key in found:
                twice.append(key)
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{source} is not complete JSON ({error}): write the bundle again"
        ) from None


def _wrong_version(source: str, version: object) -> str:
    reads = f"this software reads version {SCHEMA_VERSION}"
    if type(version) is not int:
        return f"{source} gives no schema_version as an integer; {reads}"
    hint = "update edgeclip" if version > SCHEMA_VERSION else "export the bundle again"
    return f"{source} has schema version {version}, but {reads}: {hint}"


def _interval(gate: GateRecord) -> str:
    if gate.confidence == 1:
        return "these items"
    level = "" if gate.confidence == 0.95 else f" ({100 * gate.confidence:.3g}%)"
    return interval_ends(gate.interval, lambda end: f"{end:.5f}") + level


def gates_table(gates: Sequence[tuple[str, GateRecord]], remarks: Iterable[GateRemark] = ()) -> str:
    """Return one line for each gate, then the data they were measured on, then the remarks.

    Intervals are those of 95% where nothing else is said.

    Nothing in a name can move the cursor or colour the terminal.

    Args:
        gates: what each gate is about, such as "image int8", and the gate:
            `Manifest.all_gates`.
        remarks: warnings of the export: `Manifest.remarks`.
    """
    data = list(dict.fromkeys(gate.data for _, gate in gates if gate.data is not None))
    rows: list[tuple[str, ...]] = [("what", "gate", "value", "interval", "bound", "data", "")]
    rows += [
        (
            plain_text(subject),
            plain_text(gate.name),
            f"{gate.value:.5f}",
            _interval(gate),
            f"{gate.direction} {gate.bound:g} {plain_text(gate.unit)}",
            "" if gate.data is None else f"[{data.index(gate.data) + 1}]",
            gate.outcome,
        )
        for subject, gate in gates
    ]
    lines = [columns(rows, left=len(rows[0]))]
    lines += [
        f"data [{number}]: {plain_text(item.name)}; {item.count:,} measured; "
        f"sha256 {item.sha256[:16]}"
        for number, item in enumerate(data, start=1)
    ]
    lines += [f"warning: {plain_text(str(remark))}" for remark in remarks]
    return "\n".join(lines)
