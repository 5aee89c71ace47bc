"""Define the quality gates of a bundle, and judge embeddings against their bounds."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.export.errors import GateError
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import LabelSet, cosines
from edgeclip.runtime.bundle.manifest import DataRecord, GateRecord, keeps_bound
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.intervals import (
    bootstrap,
    bootstrap_difference,
    bootstrap_percentile,
)
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import label_ranks, pair_ranks
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

_UNIT = 5e-3  # the largest allowed difference of an embedding's length from 1
_SAME = 1e-3  # largest distance of two embeddings that count as one


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one measured value."""

    name: str
    direction: Literal[">=", "<="]
    bound: float
    unit: str

    def judge(self, measured: Interval, data: DataRecord | None = None) -> GateRecord:
        """Compare the measured value (not its interval) with the bound.

        `data` describes what it was measured on, for the record.
        """
        return GateRecord(
            name=self.name,
            value=measured.value,
            low=measured.low,
            high=measured.high,
            bound=self.bound,
            direction=self.direction,
            unit=self.unit,
            passed=keeps_bound(measured.value, self.direction, self.bound),
            data=data,
        )


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
    return DataRecord(source.name, len(source) if count is None else count, sha256)


def judge_tower(
    candidate: FloatArray,
    reference: FloatArray,
    bounds: Bounds,
    data: DataRecord | None = None,
) -> tuple[GateRecord, ...]:
    """Judge one tower by its embeddings [N, dim] and the reference's for the same inputs.

    Embeddings that are not finite or not of length 1, as after an overflow in fp16, miss a gate of
    their own, and no other gate is judged.
    """
    usable = np.isfinite(candidate).all(axis=1)
    usable &= np.abs(np.linalg.norm(candidate.astype(np.float64), axis=1) - 1) <= _UNIT
    whole = Gate("usable embeddings", ">=", 1.0, "share").judge(bootstrap(usable), data)
    if not whole.passed:
        return (whole,)
    found = cosines(candidate, reference)
    mean = Gate("mean cosine", ">=", bounds.mean_cosine, "cosine")
    low = Gate("1st-percentile cosine", ">=", bounds.p1_cosine, "cosine")
    return (
        whole,
        mean.judge(bootstrap(found), data),
        low.judge(bootstrap_percentile(found, 1), data),
    )


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
    return COLLAPSE_GATE.judge(bootstrap(apart.min(axis=1) > _SAME), data)


def judge_retrieval(
    candidate: PairEmbeddings,
    reference: PairEmbeddings,
    bounds: Bounds,
    name: str,
    data: DataRecord | None = None,
    relevance: Relevance | None = None,
) -> GateRecord:
    """Judge the R@1 that the two towers of the candidate lose together.

    The value is in points of 100, the mean of both directions; its interval is a paired
    bootstrap over the pictures, each with all its captions. `name` says what is compared with the
    reference. Without `relevance`, texts that the reference embeds alike are equal captions.

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
    both = (reference, candidate)
    hits = [pair_ranks(item.image, item.text, relevance).hits(1) for item in both]
    loss = bootstrap_difference(100 * hits[0], 100 * hits[1])
    return Gate(f"R@1 loss {name}", "<=", bounds.r1_loss, "points").judge(loss, data)


def judge_zero_shot(
    candidate: FloatArray,
    reference: FloatArray,
    labels: LabelSet,
    targets: NDArray[Any],
    bounds: Bounds,
    data: DataRecord | None = None,
) -> GateRecord:
    """Judge the zero-shot top-1 accuracy that an image tower loses.

    The value is in points of 100; its interval is a paired bootstrap over the pictures.

    Args:
        candidate: embeddings of labelled pictures, float32 [N, dim].
        reference: the reference's embeddings of the same pictures.
        labels: K labels, embedded by the teacher; the same for both.
        targets: integers [N], the label of each picture.
        bounds: the largest allowed loss.
        data: describes the pictures, for the record.
    """
    first = [label_ranks(item, labels.embeddings, targets) <= 1 for item in (reference, candidate)]
    loss = bootstrap_difference(100.0 * first[0], 100.0 * first[1])
    gate = Gate("zero-shot top-1 loss", "<=", bounds.zero_shot_loss, "points")
    return gate.judge(loss, data)


def describe_missed(judged: Iterable[GateOutcome]) -> list[str]:
    """Describe each missed gate in one line: measured value, bound, and the gap between them."""
    return [
        f"{item.subject}: {item.record.name} is {item.record.value:.6g} (bound "
        f"{item.record.direction} {item.record.bound:g} {item.record.unit}, missed by "
        f"{abs(item.record.value - item.record.bound):.3g})"
        for item in judged
        if not item.record.passed
    ]


def raise_if_missed(judged: Iterable[GateOutcome], hint: str) -> None:
    """Raise an error if a gate was missed.

    Args:
        judged: the outcomes of the gates.
        hint: what the user can do about it.

    Raises:
        GateError: names every missed gate.
    """
    misses = describe_missed(judged)
    if misses:
        raise GateError(f"no bundle was written: {'; '.join(misses)}. {hint}")
