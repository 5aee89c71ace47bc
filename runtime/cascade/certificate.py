"""The certificate of a cascade: for which towers and queries it keeps how much quality."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, IsFinite, Lt
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest
from edgeclip.runtime.cascade.drift import ScoreSample
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import BundleError, ConfigError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.interval import Interval

# All scores lie between these two, so that thresholds stay finite numbers.
ESCALATE_ALL = 3.0  # a threshold above every score
ESCALATE_NONE = -2.0  # a threshold below every score

Flags = NDArray[np.bool_]


def needs_teacher(scores: Values, threshold: float) -> Flags:
    """Return which queries go to the teacher: bool [N]; those with a NaN score always do."""
    return ~(scores >= threshold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedOutcomes:
    """Whether student and teacher were correct, on the same N independent queries.

    Attributes:
        scores: float64 [N], confidence of the student; see `scores`.
        student: bool [N], whether the student's first entry was correct.
        escalated: bool [N], the same for the teacher with the entries that the cascade uses.
        teacher: bool [N], the same for the teacher by itself: with entries of its own if the
            student embedded those of the cascade, and otherwise equal to `escalated`.

    Raises:
        InputError: no queries, or arrays of different lengths.
    """

    scores: Values
    student: Flags
    escalated: Flags
    teacher: Flags

    def __post_init__(self) -> None:
        shapes = {item.shape for item in (self.scores, self.student, self.escalated, self.teacher)}
        if len(shapes) != 1 or self.scores.ndim != 1 or not len(self.scores):
            raise InputError(
                "paired outcomes need one score and three answers for each of N >= 1 queries"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def correct(self, threshold: float) -> Flags:
        """Return whether the cascade is correct on each query: bool [N]."""
        return np.where(needs_teacher(self.scores, threshold), self.escalated, self.student)

    def escalated_share(self, threshold: float) -> float:
        """Return the share of queries that go to the teacher."""
        return float(needs_teacher(self.scores, threshold).mean())

    def surplus(self, threshold: float, bound: float) -> Values:
        """Correct answers of the cascade minus `bound` times the teacher's: [N], in [-bound, 1].

        Its expectation is 0 or more exactly where the cascade's quality is at least `bound`
        times the teacher's.
        """
        return self.correct(threshold).astype(np.float64) - bound * self.teacher


def threshold_grid(calibration: Values, steps: int = 100) -> tuple[float, ...]:
    """Return thresholds to test, from `ESCALATE_ALL` down to `ESCALATE_NONE`, without repeats.

    Between them lie the quantiles of the calibration scores [M], `steps` of equal share. The
    thresholds must not be tested on the same scores.

    Raises:
        InputError: no calibration scores, or one that is not finite.
    """
    if calibration.ndim != 1 or not len(calibration) or not np.isfinite(calibration).all():
        raise InputError("thresholds need calibration scores, all of them finite")
    levels = np.arange(1, steps) / steps
    between = np.unique(np.quantile(calibration, levels))
    return (ESCALATE_ALL, *map(float, between[::-1]), ESCALATE_NONE)


class CertificateError(BundleError):
    """A certificate that is damaged, or for another bundle, tower or query than needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerIdentity:
    """Identify a tower by its files and precision.

    Attributes:
        name: name of its bundle.
        precision: precision in which it ran.
        files: its graph, and its weights where they lie beside it.
    """

    name: str
    precision: Precision
    files: tuple[FileRecord, ...]

    @classmethod
    def of(cls, manifest: Manifest, tower: Tower, precision: Precision) -> "TowerIdentity":
        """Return the identity of a tower of a bundle.

        Raises:
            BundleError: the bundle does not hold that precision.
        """
        graph = manifest.tower(tower).file(precision)
        paths = (graph.path, graph.data_path)
        files = tuple(file for file in manifest.files if file.path in paths)
        return cls(name=manifest.name, precision=precision, files=files)

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each file, in hexadecimal digits."""
        return tuple(file.sha256 for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySet:
    """The queries that a certificate rests on: independent draws of one population.

    Attributes:
        data: their name, for people.
        identity: SHA-256 of what identifies them.
        count: number of queries, each compared with `entries` entries.
        entries: number of entries to choose from.
        index_by: whose tower embedded the entries.
        task: the correct entry is the query's own partner ("retrieval"), or its label.
    """

    data: str
    identity: str
    count: Annotated[int, Ge(1)]
    entries: Annotated[int, Ge(2)]
    index_by: Literal["teacher", "student"]
    task: Literal["retrieval", "zero-shot"]

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Accuracies with 95% bootstrap intervals, and the share of the teacher's that is kept."""

    student: Interval
    teacher: Interval
    cascade: Interval
    kept: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(JsonRecord):
    """With probability 1 - delta, the cascade keeps `bound` of the teacher's quality.

    Attributes:
        query: the tower whose queries may be escalated.
        bound: the share of the teacher's quality (top-1, over the population that the test
            queries were drawn from) that the cascade keeps at least.
        delta: the chance that this is wrong.
        p_value: p-value of "it keeps less" at the threshold.
        space: fingerprint of the embedding space.
        student: the tower on the device.
        student_index: the student's other tower, if that embeds the entries.
        teacher: the tower on the server.
        score: confidence of the student.
        threshold: queries with a lower score go to the teacher.
        escalated: share of these queries; the interval has confidence 1 - delta for all
            thresholds at once, so it holds for this one.
        quality: quality on the test queries.
        sample: scores without drift.
        tested_on: the test queries.
        created: ISO 8601 in UTC.
        command: the command line.

    Raises:
        ValueError: a value out of bounds.
    """

    WHAT: ClassVar[str] = "a certificate"
    HINT: ClassVar[str] = "certify again"

    query: Tower
    bound: Annotated[float, Gt(0)]
    delta: Annotated[float, Gt(0), Lt(1)]
    p_value: Annotated[float, Ge(0)]
    space: str
    student: TowerIdentity
    student_index: TowerIdentity | None
    teacher: TowerIdentity
    score: Score
    threshold: IsFinite[float]
    escalated: Interval
    quality: Quality
    sample: ScoreSample
    tested_on: QuerySet
    created: str
    command: str

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.bound > 1:
            raise ValueError("bound is a share, 1 at most")
        if self.p_value > self.delta:
            raise ValueError(f"a p-value of {self.p_value:g} certifies nothing at {self.delta:g}")

    @property
    def path(self) -> str:
        """The path of the certificate in a bundle."""
        return certificate_path(self.query)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`: 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def promise(self) -> str:
        """The certificate's statement as one sentence."""
        return (
            f"Keeps at least {100 * self.bound:.3g}% of the quality of {self.teacher.name} on "
            f"queries like those of {self.tested_on.data} (wrong with probability {self.delta:g} "
            f"at most), asking it for {self.escalated.value:.1%} of them"
        )

    def check(self, manifest: Manifest, precisions: Mapping[Tower, Precision]) -> None:
        """Raise if the student of a bundle is not the one that was certified.

        Args:
            manifest: manifest of the student's bundle.
            precisions: precisions in which its towers run.

        Raises:
            CertificateError: another embedding space, precision or tower.
        """
        hint = "certify this bundle with edgeclip cascade"
        if manifest.space != self.space:
            raise CertificateError(f"{self.path} is of another embedding space: {hint}")
        other: Tower = "text" if self.query == "image" else "image"
        for tower, expected in ((self.query, self.student), (other, self.student_index)):
            if expected is None:
                continue
            if precisions[tower] != expected.precision:
                raise CertificateError(
                    f"{self.path} is for {expected.precision}, but the {tower} tower runs in "
                    f"{precisions[tower]}: {hint}"
                )
            found = TowerIdentity.of(manifest, tower, expected.precision)
            if found.hashes != expected.hashes:
                raise CertificateError(f"{self.path} is for another {tower} tower: {hint}")


def certificate_path(query: Tower) -> str:
    """Return the path in a bundle of the certificate for queries of a tower."""
    return f"cascade/{query}.json"


def read_certificate(bundle: Bundle, query: Tower = "image") -> Certificate | None:
    """Read the certificate of a bundle; None if it has none for such queries.

    Raises:
        BundleError: it cannot be read, was altered, or is damaged.
    """
    path = certificate_path(query)
    if path not in {file.path for file in bundle.manifest.files}:
        return None
    try:
        text = bundle.file_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise CertificateError(f"{bundle.path / path} is not UTF-8 text: certify again") from None
    try:
        found = Certificate.from_json(text, source=str(bundle.path / path))
    except ConfigError as error:
        raise CertificateError("; ".join(str(error).split("\n  "))) from None
    if found.query != query:
        raise CertificateError(f"{bundle.path / path} is for {found.query} queries")
    return found
