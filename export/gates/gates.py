"""Define the quality gates of a bundle, and judge embeddings against their bounds."""

import hashlib
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.export.errors import GateError
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import LabelSet, cosines
from edgeclip.runtime.bundle.manifest import DataRecord, GateRecord, keeps_bound
from edgeclip.runtime.console import interval_ends
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import label_ranks, pair_ranks
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.clusters import Clusters, cluster_sums, effective_count
from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.percentiles import estimate_percentile, least_count
from edgeclip.runtime.stats.shares import estimate_loss
from edgeclip.runtime.stats.student_t import estimate_mean
from edgeclip.runtime.stats.three_outcomes import BoundTest, Direction, Outcome, judge

ACCEPT_OPTION = "--accept-undecided"
# A path from the root, from a home or from above; no address of the web, no name of a repository.
_ABSOLUTE = re.compile(r"(?<![\w:/.~-])(?:~\w*|\.\.)?(?:/[^\s,'\"=/]+)+/?")
_UNIT = 5e-3  # the largest allowed difference of an embedding's length from 1
_SAME = 1e-3  # largest distance of two embeddings that count as one
_MISSED = 0.025  # chance that an end of a 95% interval is wrong


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one measured value."""

    name: str
    direction: Direction
    bound: float
    unit: str

    def judge_items(self, value: float, data: DataRecord | None = None) -> GateRecord:
        """Judge a value that is about the measured items alone, such as the least of all cosines.

        `data` describes the items, for the record.
        """
        kept = keeps_bound(value, self.direction, self.bound)
        return _record(self, value, (value, value), "passed" if kept else "failed", data, 1.0)


def _record(
    gate: Gate,
    value: float,
    ends: tuple[float, float],
    outcome: Outcome,
    data: DataRecord | None,
    confidence: float,
) -> GateRecord:
    return GateRecord(
        name=gate.name,
        value=value,
        low=ends[0],
        high=ends[1],
        bound=gate.bound,
        direction=gate.direction,
        unit=gate.unit,
        outcome=outcome,
        data=data,
        confidence=round(confidence, 6),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGate:
    """A gate with an estimate of what it bounds in the population that the items were drawn from.

    Attributes:
        gate: the gate.
        estimate: in the gate's unit divided by `scale`.
        scale: 100 for an estimated share of which the gate counts points of 100.
        data: describes the items, for the record.
    """

    gate: Gate
    estimate: Estimate
    scale: float = 1.0
    data: DataRecord | None = None


def judge_gates(measured: Sequence[MeasuredGate], looks: int = 1) -> tuple[GateRecord, ...]:
    """Judge gates together: see `three_outcomes`.

    Args:
        measured: the gates of one candidate.
        looks: how many candidates may be held against the same items until one passes: all of
            their intervals hold together with 95%.
    """
    confidence = 1 - _MISSED / looks  # of each end
    tests = [
        BoundTest((item.estimate,), item.gate.direction, item.gate.bound / item.scale)
        for item in measured
    ]
    records = []
    for item, outcome in zip(measured, judge(tests, confidence), strict=True):
        found = item.estimate.interval_at(confidence)
        ends = (item.scale * found.low, item.scale * found.high)
        value = item.scale * item.estimate.value
        records.append(_record(item.gate, value, ends, outcome, item.data, 2 * confidence - 1))
    return tuple(records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The bounds that a precision must keep; cosines are with the reference's embeddings.

    Attributes:
        mean_cosine: the smallest allowed mean cosine.
        p1_cosine: the smallest allowed 1st percentile of the cosines.
        r1_loss: the largest allowed loss of R@1 (mean of both directions), in points of 100.
        zero_shot_loss: the largest allowed loss of zero-shot top-1 accuracy, in points of 100.
    """

    mean_cosine: float
    p1_cosine: float
    r1_loss: float = 1.0
    zero_shot_loss: float = 0.5


# fp32 is compared with torch, the others with fp32.
DEFAULT_BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(mean_cosine=0.9999, p1_cosine=0.999),
    "fp16": Bounds(mean_cosine=0.999, p1_cosine=0.995),
    "int8": Bounds(mean_cosine=0.995, p1_cosine=0.98),
    "fp8": Bounds(mean_cosine=0.995, p1_cosine=0.98),
}


# Most, not all: texts may differ only where they are cut, or in words that the tokenizer drops.
COLLAPSE_GATE = Gate("told apart", ">=", 0.9, "share")
COLLAPSE_HINT = (
    "Different inputs have the same embedding: tokenizer, config.json, processor and weights do "
    "not belong together, or the training collapsed"
)


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """The record of a judged gate, and its subject such as "image int8"."""

    subject: str
    record: GateRecord


def data_record(source: Source, count: int | None = None) -> DataRecord:
    """Describe the items that a gate was measured on: the first `count` of a source, or all."""
    sha256 = hashlib.sha256(source.identity.encode()).hexdigest()
    return DataRecord(without_folders(source.name), len(source) if count is None else count, sha256)


def without_folders(text: str) -> str:
    """Shorten each absolute path in a text to its last part.

    A bundle goes to others, who are not to read how the folders of this computer are called.
    """
    return _ABSOLUTE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


def judge_usable(embeddings: FloatArray, data: DataRecord | None = None) -> GateRecord:
    """Judge whether all embeddings [N, dim] are finite and of length 1.

    An overflow in fp16 makes some that are not; then no other gate can be judged.
    """
    usable = np.isfinite(embeddings).all(axis=1)
    usable &= np.abs(np.linalg.norm(embeddings.astype(np.float64), axis=1) - 1) <= _UNIT
    return Gate("usable embeddings", ">=", 1.0, "share").judge_items(float(usable.mean()), data)


def judge_equality(
    candidate: FloatArray,
    reference: FloatArray,
    bounds: Bounds,
    data: DataRecord | None = None,
) -> tuple[GateRecord, ...]:
    """Judge whether a graph computes what its reference does, on the same inputs.

    Args:
        candidate, reference: embeddings float32 [N, dim].
        bounds: of the mean cosine, and (the 1st percentile's) of every single one.
        data: describes the inputs, for the record.
    """
    whole = judge_usable(candidate, data)
    if not whole.passed:
        return (whole,)
    found = cosines(candidate, reference)
    mean = Gate("mean cosine", ">=", bounds.mean_cosine, "cosine")
    least = Gate("least cosine", ">=", bounds.p1_cosine, "cosine")
    return (
        whole,
        mean.judge_items(float(found.mean()), data),
        least.judge_items(float(found.min()), data),
    )


def measure_cosines(
    candidate: FloatArray,
    reference: FloatArray,
    bounds: Bounds,
    data: DataRecord | None = None,
    clusters: Clusters | None = None,
) -> tuple[MeasuredGate, ...]:
    """Measure mean and 1st percentile of the cosines of usable embeddings [N, dim].

    `clusters` [N] are equal for inputs that belong together; of a percentile, each is one input (of
    unequal ones, `effective_count`).
    """
    found = cosines(candidate, reference)
    independent = None
    if clusters is not None:
        independent = math.floor(effective_count(cluster_sums(clusters, found)[0]))
    mean = Gate("mean cosine", ">=", bounds.mean_cosine, "cosine")
    low = Gate("1st-percentile cosine", ">=", bounds.p1_cosine, "cosine")
    percentile = estimate_percentile(found, 1, least=-1.0, most=1.0, independent=independent)
    return (
        MeasuredGate(
            gate=mean, estimate=estimate_mean(found, clusters, least=-1.0, most=1.0), data=data
        ),
        MeasuredGate(gate=low, estimate=percentile, data=data),
    )


def judge_tower(
    candidate: FloatArray,
    reference: FloatArray,
    bounds: Bounds,
    data: DataRecord | None = None,
) -> tuple[GateRecord, ...]:
    """Judge one tower by its embeddings [N, dim] and the reference's for the same inputs."""
    whole = judge_usable(candidate, data)
    if not whole.passed:
        return (whole,)
    return (whole, *judge_gates(measure_cosines(candidate, reference, bounds, data)))


def judge_collapse(
    embeddings: FloatArray, inputs: Sequence[Hashable], data: DataRecord | None = None
) -> GateRecord | None:
    """Judge the share of different inputs whose embedding is like that of no other.

    Args:
        embeddings: of length 1, float32 [N, dim].
        inputs: what each is the embedding of; equal inputs count once.
        data: describes them, for the record.

    Returns:
        The record; None if all inputs are equal, so that there is nothing to judge.
    """
    rows = list({item: row for row, item in enumerate(inputs)}.values())
    if len(rows) < 2:
        return None
    different = embeddings[rows].astype(np.float64)
    apart = np.linalg.norm(different[:, None] - different[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return COLLAPSE_GATE.judge_items(float((apart.min(axis=1) > _SAME).mean()), data)


def measure_retrieval(
    candidate: PairEmbeddings,
    reference: PairEmbeddings,
    bounds: Bounds,
    name: str,
    data: DataRecord | None = None,
    relevance: Relevance | None = None,
    clusters: Clusters | None = None,
) -> MeasuredGate:
    """Measure the R@1 that the two towers of the candidate lose together.

    The gate is in points of 100, the mean of both directions, over the pictures, each with all its
    captions. `name` says what is compared with the reference. Without `relevance`, texts that the
    reference embeds alike are equal captions. `clusters` [pictures] are equal for pictures that
    belong together.

    Raises:
        ConfigError: every caption is right for every picture, so that no answer can be wrong.
    """
    if relevance is None:
        relevance = Relevance.of_texts_embedded(reference.text)
    if relevance.tells_nothing:
        raise ConfigError(
            f"R@1 cannot be judged: each of the {relevance.images} test captions is right for "
            "every picture; give captions that tell the pictures apart"
        )
    theirs, ours = (
        pair_ranks(item.image, item.text, relevance).hits(1) for item in (reference, candidate)
    )
    gate = Gate(f"R@1 loss {name}", "<=", bounds.r1_loss, "points")
    estimate = estimate_loss(theirs, ours, clusters)
    return MeasuredGate(gate=gate, estimate=estimate, scale=100, data=data)


def measure_zero_shot(
    candidate: FloatArray,
    reference: FloatArray,
    labels: LabelSet,
    targets: NDArray[Any],
    bounds: Bounds,
    data: DataRecord | None = None,
    clusters: Clusters | None = None,
) -> MeasuredGate:
    """Measure the zero-shot top-1 accuracy that an image tower loses, in points of 100.

    Args:
        candidate: embeddings of labelled pictures, float32 [N, dim].
        reference: the reference's embeddings of the same pictures.
        labels: K labels, embedded by the teacher; the same for both.
        targets: integers [N], the label of each picture.
        bounds: the largest allowed loss.
        data: describes the pictures, for the record.
        clusters: integers [N], equal for pictures that belong together.
    """
    theirs, ours = (
        label_ranks(item, labels.embeddings, targets) <= 1 for item in (reference, candidate)
    )
    gate = Gate("zero-shot top-1 loss", "<=", bounds.zero_shot_loss, "points")
    estimate = estimate_loss(theirs, ours, clusters)
    return MeasuredGate(gate=gate, estimate=estimate, scale=100, data=data)


def is_missed(record: GateRecord, *, accept_undecided: bool) -> bool:
    """Return whether a gate keeps its candidate from being shipped.

    With `accept_undecided`, an undecided gate does not if the measured value keeps the bound.
    """
    return not (record.passed or (accept_undecided and _is_open(record)))


def _is_open(record: GateRecord) -> bool:
    return record.outcome == "undecided" and record.is_inside


def text_clusters(relevance: Relevance | None, clusters: Clusters | None) -> Clusters | None:
    """Return which texts belong together: those of one picture, and of pictures that do.

    Args:
        relevance: whose caption each text is; None where text i is that of picture i.
        clusters: of the pictures, int64 [N]; None where these are independent.
    """
    if relevance is None or len(relevance.owner) == relevance.images:
        return clusters
    return relevance.owner if clusters is None else clusters[relevance.owner]


def describe_missed(judged: Iterable[GateOutcome], *, accept_undecided: bool = False) -> list[str]:
    """Describe each gate that was missed in one line, with what would decide an undecided one."""
    return [
        f"{item.subject}: {_miss(item.record)}"
        for item in judged
        if is_missed(item.record, accept_undecided=accept_undecided)
    ]


def _miss(record: GateRecord) -> str:
    bound = f"bound {record.direction} {record.bound:g} {record.unit}"
    if record.outcome == "failed":
        gap = abs(record.value - record.bound)
        return f"{record.name} is {record.value:.6g} ({bound}, missed by {gap:.3g})"
    return (
        f"{record.name} is undecided: {record.value:.6g}, interval "
        f"{interval_ends(record.interval, '{:.6g}'.format)} ({bound}); {_would_decide(record)}"
    )


def _would_decide(record: GateRecord) -> str:
    """Say what so many items can tell, and about how many would decide."""
    count = 0 if record.data is None else record.data.count
    enough = least_count(1, (1 + record.confidence) / 2)
    if record.name.startswith("1st-percentile") and count < enough:
        return f"{count} items tell nothing of a 1st percentile, {enough} do"
    reach = record.high - record.value if record.direction == "<=" else record.value - record.low
    if math.isinf(reach):
        return f"{count} items set no bound on it"
    says = f"{count} items tell {reach:.2g} {record.unit} from nothing"
    gap = abs(record.bound - record.value)
    if count and gap and reach > 0:
        says += f"; about {_round_up(count * (reach / gap) ** 2):,} would decide"
    return says


def _round_up(count: float) -> int:
    """Round up to two digits."""
    step = float(10 ** max(0, math.floor(math.log10(count)) - 1))
    return round(step * math.ceil(count / step))


def raise_if_missed(
    judged: Iterable[GateOutcome], hint: str, *, accept_undecided: bool = False
) -> None:
    """Raise an error if a gate was missed.

    Args:
        judged: the outcomes of the gates.
        hint: what the user can do about it.
        accept_undecided: see `is_missed`.

    Raises:
        GateError: names every missed gate.
    """
    found = list(judged)
    misses = describe_missed(found, accept_undecided=accept_undecided)
    if not misses:
        return
    if all(item.record.passed or _is_open(item.record) for item in found):
        hint = (
            "Give more test pairs (and --looks 2, for the second look at them), or ship what is "
            f"undecided with {ACCEPT_OPTION}"
        )
    raise GateError(f"no bundle was written: {'; '.join(misses)}. {hint}")
