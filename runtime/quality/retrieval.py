"""Quality of embeddings: retrieval in both directions, zero-shot classification.

Ranks are pessimistic: a target ranks behind everything with an equal score. A collapsed tower,
whose embeddings are all the same, therefore has R@1 = 0; optimistic ranks would call it perfect.
Scores are cosines in float64; those closer than `TIE` count as equal, since matrix products of
equal rows may differ in the last bits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.index import paired_unit_rows, unit_rows
from edgeclip.runtime.errors import InputError

TIE = 1e-9  # far above float64 rounding, far below a float32 embedding's resolution
_SCORES_AT_ONCE = 1 << 23  # 64 MiB of float64


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Rank of each pair's partner (1 is best) in either direction, int64 [N].

    `hits(k)` are per-item values for the bootstrap; those of two models are paired.
    """

    image_to_text: NDArray[np.int64]
    text_to_image: NDArray[np.int64]

    def hits(self, k: int) -> NDArray[np.float64]:
        """Return for each pair the share of directions (0, 0.5, 1) with a rank of at most k.

        Its mean is R@k, averaged over both directions.
        """
        found = (self.image_to_text <= k).astype(np.float64) + (self.text_to_image <= k)
        return found / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionMetrics:
    """Retrieval in one direction: R@k as shares in [0, 1], ranks from 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Retrieval in both directions, and the mean of their R@1."""

    image_to_text: DirectionMetrics
    text_to_image: DirectionMetrics
    mean_r1: float


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Top-1 and top-5 accuracy, shares in [0, 1]."""

    top1: float
    top5: float


def retrieval(image_embeddings: NDArray[Any], text_embeddings: NDArray[Any]) -> Retrieval:
    """Measure retrieval between images and texts, where image i belongs to text i.

    Args:
        image_embeddings: floats [N, dim].
        text_embeddings: floats [N, dim].

    Raises:
        InputError: shapes that differ, NaN or infinity, or an embedding of length 0.
    """
    return retrieval_of_ranks(pair_ranks(image_embeddings, text_embeddings))


def pair_ranks(image_embeddings: NDArray[Any], text_embeddings: NDArray[Any]) -> Ranks:
    """Rank each pair's partner among all [N], in both directions.

    Raises:
        InputError: as `retrieval`.
    """
    images, texts = paired_unit_rows(image_embeddings, text_embeddings)
    own = np.arange(len(images))
    return Ranks(_ranks(images, texts, own), _ranks(texts, images, own))


def retrieval_of_ranks(ranks: Ranks) -> Retrieval:
    """Compute the retrieval metrics of ranks."""
    image_to_text = _direction(ranks.image_to_text)
    text_to_image = _direction(ranks.text_to_image)
    return Retrieval(image_to_text, text_to_image, (image_to_text.r1 + text_to_image.r1) / 2)


def zero_shot(
    image_embeddings: NDArray[Any], label_embeddings: NDArray[Any], labels: NDArray[Any]
) -> ZeroShot:
    """Measure the accuracy of zero-shot classification.

    Args:
        image_embeddings: floats [N, dim].
        label_embeddings: floats [K, dim], one for each class.
        labels: integers [N], the correct class of each image, from 0 to K - 1.

    Raises:
        InputError: shapes that do not fit, NaN or infinity, or labels out of range.
    """
    ranks = label_ranks(image_embeddings, label_embeddings, labels)
    return ZeroShot(float((ranks <= 1).mean()), float((ranks <= 5).mean()))


def label_ranks(
    image_embeddings: NDArray[Any], label_embeddings: NDArray[Any], labels: NDArray[Any]
) -> NDArray[np.int64]:
    """Rank each image's correct class among all K: int64 [N], 1 is best.

    Raises:
        InputError: as `zero_shot`.
    """
    images = unit_rows(image_embeddings, "image embeddings")
    classes = unit_rows(label_embeddings, "label embeddings")
    if images.shape[1] != classes.shape[1]:
        raise InputError(
            f"image embeddings have {images.shape[1]} dimensions, label embeddings "
            f"{classes.shape[1]}: take both from one embedding space"
        )
    right = np.asarray(labels)
    if right.shape != (len(images),) or right.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {right.shape} and dtype {right.dtype}: "
            f"give {len(images)} integers, one for each image"
        )
    if right.min() < 0 or right.max() >= len(classes):
        raise InputError(
            f"labels span {right.min()} to {right.max()}, but classes go from 0 to "
            f"{len(classes) - 1}"
        )
    return _ranks(images, classes, right)


def _ranks(
    queries: NDArray[np.float64], targets: NDArray[np.float64], right: NDArray[Any]
) -> NDArray[np.int64]:
    """Count for each query the targets that score at least as high as the correct one."""
    ranks = np.empty(len(queries), dtype=np.int64)
    chunk = max(1, _SCORES_AT_ONCE // len(targets))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        scores = queries[part] @ targets.T
        own = np.take_along_axis(scores, right[part, None], axis=1)
        ranks[part] = (scores >= own - TIE).sum(axis=1)
    return ranks


def _direction(ranks: NDArray[np.int64]) -> DirectionMetrics:
    return DirectionMetrics(
        r1=float((ranks <= 1).mean()),
        r5=float((ranks <= 5).mean()),
        r10=float((ranks <= 10).mean()),
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
    )
