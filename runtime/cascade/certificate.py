"""The certificate of a cascade: for which towers, task and queries it keeps how much quality."""

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
from edgeclip.runtime.bundle.index import Index, LabelSet
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest
from edgeclip.runtime.cascade.drift import WatchedShare
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import BundleError, ConfigError, InputError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters
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
    """Whether student and teacher were correct, on the same N queries.

    Attributes:
        scores: float64 [N], confidence of the student; see `scores`.
        student: bool [N], whether the student's first entry was correct.
        escalated: bool [N], the same for the teacher as the cascade asks it. In zero-shot
            classification it chooses among its own labels, so this equals `teacher`; in retrieval
            it chooses among the entries of the cascade's index.
        teacher: bool [N], the same for the teacher by itself, with entries of its own.
        agree: bool [N], whether the first entries of student and teacher, as the cascade asks it,
            are the same; None where that is not known.
        clusters: int64 [N], equal for queries that are not independent of each other; None where
            all are independent.

    Raises:
        InputError: no queries, or arrays of different lengths.
    """

    scores: Values
    student: Flags
    escalated: Flags
    teacher: Flags
    agree: Flags | None = None
    clusters: Clusters | None = None

    def __post_init__(self) -> None:
        arrays = (self.scores, self.student, self.escalated, self.teacher)
        more = (self.agree, self.clusters)
        shapes = {item.shape for item in (*arrays, *more) if item is not None}
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


Task = Literal["retrieval", "zero-shot"]
_COUNT_TOLERANCE = 0.1  # of the number of entries in an index


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySet:
    """The queries that a certificate rests on, draws of one population, and what they choose from.

    Attributes:
        data: their name, for people.
        identity: SHA-256 of what identifies them.
        count: number of queries, each compared with `entries` entries.
        clusters: number of groups of queries that are independent of each other.
        largest: number of queries in the largest group.
        cluster_by: how the groups were found; "none" if all queries are taken as independent.
        assumed: what is assumed of the groups, as part of a sentence.
        entries: number of entries to choose from.
        index_by: whose tower embedded the entries that the student's queries are compared with.
        embedder: names that tower, see `Encoder.embedder`.
        task: the correct entry is the query's own partner ("retrieval"), or its label.
        labels: digest of the label set of these entries, see `LabelSet.digest`; None in retrieval.
        teacher_labels: digest of the label set that escalated pictures choose from; likewise.

    Raises:
        ValueError: a number out of bounds, or label sets without their task.
    """

    data: str
    identity: str
    count: Annotated[int, Ge(1)]
    clusters: Annotated[int, Ge(1)]
    largest: Annotated[int, Ge(1)]
    cluster_by: Literal["folder", "time", "embedding", "none"]
    assumed: str
    entries: Annotated[int, Ge(2)]
    index_by: Literal["teacher", "student"]
    embedder: str
    task: Task
    labels: str | None = None
    teacher_labels: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        has_labels = {self.labels is not None, self.teacher_labels is not None}
        if has_labels != {self.task == "zero-shot"}:
            raise ValueError("label sets belong to zero-shot classification, two to each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Accuracies with 95% intervals, and the share of the teacher's that is kept."""

    student: Interval
    teacher: Interval
    cascade: Interval
    kept: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(JsonRecord):
    """With probability 1 - delta, the cascade keeps `bound` of the teacher's quality at its task.

    Attributes:
        query: the tower whose queries may be escalated.
        bound: the share of the teacher's quality (top-1, over the population that the test
            queries were drawn from) that the cascade keeps at least.
        delta: the chance that this is wrong, over all tries on these queries.
        tested_at: the part of `delta` that this try had.
        p_value: p-value of "it keeps less" at the threshold, `tested_at` at most.
        try_number: how many hypotheses had been tried on these queries, this one included; None
            where no ledger was kept.
        space: fingerprint of the embedding space.
        student: the tower on the device.
        student_index: the student's other tower, if that embeds the entries.
        teacher: the tower on the server.
        score: confidence of the student.
        threshold: queries with a lower score go to the teacher.
        escalated: share of these queries, with its 95% interval.
        watched: shares of low scores that the device watches. Any of their intervals misses the
            true share with probability `drift.WATCHED_ERROR` at most.
        disagreement: share of the queries that the student answers alone whose first entry is not
            the teacher's; its upper end likewise. None where it answers none alone.
        quality: quality on the test queries.
        tested_on: the test queries, and what they choose from.
        created: ISO 8601 in UTC.
        command: the command line.

    Raises:
        ValueError: a value out of bounds.
    """

    SCHEMA_VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "a certificate"
    HINT: ClassVar[str] = "certify again"

    query: Tower
    bound: Annotated[float, Gt(0)]
    delta: Annotated[float, Gt(0), Lt(1)]
    tested_at: Annotated[float, Gt(0), Lt(1)]
    p_value: Annotated[float, Ge(0)]
    try_number: Annotated[int | None, Ge(1)]
    space: str
    student: TowerIdentity
    student_index: TowerIdentity | None
    teacher: TowerIdentity
    score: Score
    threshold: IsFinite[float]
    escalated: Interval
    watched: tuple[WatchedShare, ...]
    disagreement: Interval | None
    quality: Quality
    tested_on: QuerySet
    created: str
    command: str

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.bound > 1:
            raise ValueError("bound is a share, 1 at most")
        if self.tested_at > self.delta:
            raise ValueError(f"a try has a part of {self.delta:g}, not {self.tested_at:g}")
        if self.p_value > self.tested_at:
            raise ValueError(
                f"a p-value of {self.p_value:g} certifies nothing at {self.tested_at:g}"
            )

    @property
    def path(self) -> str:
        """The path of the certificate in a bundle."""
        return certificate_path(self.query)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`: 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def task(self) -> str:
        """What the queries do, and among which entries, as part of a sentence."""
        tested, whose = self.tested_on, "the teacher"
        if tested.index_by == "student":
            whose = "the student"
        if tested.task == "zero-shot":
            return (
                f"classifying pictures by {tested.entries:,} labels embedded by {whose} "
                f"(label set {str(tested.labels)[:12]})"
            )
        sought, given = ("caption", "picture") if self.query == "image" else ("picture", "caption")
        return (
            f"finding the {sought} of a {given} among {tested.entries:,} entries embedded by "
            f"{whose} (tower {tested.embedder[:12]})"
        )

    @property
    def promise(self) -> str:
        """The certificate's statement: what is kept, at which task, and what is assumed."""
        tested, alone = self.tested_on, self.quality.student
        largest = ""
        if tested.cluster_by != "none":
            most = "none" if tested.largest == 1 else f"at most {tested.largest:,}"
            largest = f", of which {most} belong together"
        return (
            f"Keeps at least {100 * self.bound:.3g}% of the quality of {self.teacher.name} at "
            f"{self.task}, on queries like those of {tested.data} (wrong with probability "
            f"{self.delta:g} at most), asking it for {self.escalated.value:.1%} of them. This "
            f"assumes that {tested.assumed}{largest}. Where {self.teacher.name} cannot be reached "
            f"the student's own answers stand, without a promise: {alone.value:.1%} of them were "
            f"right here (95% interval {alone.low:.1%} to {alone.high:.1%})"
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

    def check_labels(self, labels: LabelSet) -> None:
        """Raise if pictures are to be classified by other labels than those of the certificate.

        Raises:
            CertificateError: another task, or another label set.
        """
        if self.tested_on.task != "zero-shot":
            raise self._refusal(
                f"classifying by {len(labels.names):,} labels",
                "certify that with edgeclip cascade --labels, or use `search`",
            )
        if labels.digest != self.tested_on.labels:
            embedder = labels.embedder[:12] or "unknown"
            raise self._refusal(
                f"classifying by {len(labels.names):,} labels embedded by {embedder} (label set "
                f"{labels.digest[:12]})",
                "give no labels to take those that were certified, or certify these",
            )

    def check_index(self, index: Index) -> None:
        """Raise if an index is not like the entries that the certificate was tested with.

        Raises:
            CertificateError: another task, another embedder, or more than a tenth more or fewer
                entries.
        """
        tested, count = self.tested_on, len(index.keys)
        if tested.task != "retrieval":
            raise self._refusal(
                "searching an index", "certify that with edgeclip cascade, or use `classify`"
            )
        if index.embedder != tested.embedder:
            what = (
                f"an index embedded by the tower {index.embedder[:12]}"
                if index.embedder
                else "an index that does not say what embedded it"
            )
            raise self._refusal(
                what, f"make it with edgeclip embed and the {tested.index_by}'s bundle"
            )
        if abs(count - tested.entries) > _COUNT_TOLERANCE * tested.entries:
            raise self._refusal(
                f"an index of {count:,} entries",
                "certify with that many (--gallery-count, or a gallery of that size)",
            )

    def check_queries(self, tower: Tower) -> None:
        """Raise if queries are not of the kind that was certified.

        Raises:
            CertificateError: texts where pictures were certified, or the other way round.
        """
        if tower != self.query:
            kinds = {"image": "pictures", "text": "texts"}
            raise self._refusal(
                f"queries that are {kinds[tower]}",
                f"ask about {kinds[self.query]}, or use an Encoder, which promises nothing",
            )

    def _refusal(self, given: str, mend: str) -> CertificateError:
        return CertificateError(f"{self.path} is for {self.task}, not for {given}: {mend}")


def certificate_path(query: Tower) -> str:
    """Return the path in a bundle of the certificate for queries of a tower."""
    return f"cascade/{query}.json"


def certified_labels_path(by: Literal["teacher", "student"]) -> str:
    """Return the path in a bundle of the certified labels as one of the two embedded them."""
    return f"cascade/labels-{by}.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertifiedLabels:
    """The label sets of a zero-shot certificate.

    Attributes:
        entries: what the student's pictures are compared with.
        teacher: what escalated pictures are compared with; the same names.
    """

    entries: LabelSet
    teacher: LabelSet


def read_labels(bundle: Bundle, certificate: Certificate) -> CertifiedLabels | None:
    """Read the label sets beside a certificate; None where it is for retrieval.

    Raises:
        CertificateError: they are missing, damaged, or not those that were certified.
    """
    tested = certificate.tested_on
    if tested.task != "zero-shot":
        return None
    entries = _read_labels(bundle, certified_labels_path(tested.index_by), tested.labels)
    teacher = _read_labels(bundle, certified_labels_path("teacher"), tested.teacher_labels)
    return CertifiedLabels(entries=entries, teacher=teacher)


def _read_labels(bundle: Bundle, path: str, digest: str | None) -> LabelSet:
    try:
        found = LabelSet.load(bundle.path / path)
    except InputError as error:
        raise CertificateError(f"{error}; certify again") from None
    if found.digest != digest:
        raise CertificateError(
            f"{bundle.path / path} does not hold the labels that were certified: certify again"
        )
    return found


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
