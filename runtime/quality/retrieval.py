"""Quality of embeddings: retrieval in both directions, zero-shot classification.

Retrieval is over relevance (`relevance.py`), by the protocol of Karpathy and Fei-Fei (2015) that
COCO's 1K and 5K and Flickr30k's 1K test sets are reported by: image to text counts each image
once, and its rank is that of the best placed right text; text to image counts each caption once.

Ranks are pessimistic: a target ranks behind every wrong one with an equal score. A collapsed tower,
whose embeddings are all the same, therefore has R@1 = 0; optimistic ranks would call it perfect.
Scores are cosines in float64; those closer than `TIE` count as equal, since matrix products of
equal rows may differ in the last bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.index import paired_unit_rows, unit_rows
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.quality.relevance import Relevance

TIE = 1e-9  # far above float64 rounding, far below a float32 embedding's resolution
_SCORES_AT_ONCE = 1 << 23  # 64 MiB of float64


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Rank of the best placed right answer to each query (1 is best), in either direction.

    The hits are values of each image [N] for intervals, an image with all its captions being
    one item; those of two models are paired.

    Attributes:
        image_to_text: int64 [N], of each image.
        text_to_image: int64 [M], of each caption.
        owner: int64 [M], the image of each caption; None if caption i is that of image i.
    """

    image_to_text: NDArray[np.int64]
    text_to_image: NDArray[np.int64]
    owner: NDArray[np.int64] | None = None

    def image_hits(self, k: int) -> NDArray[np.float64]:
        """Return whether each image finds a text by rank k: 0 or 1; the mean is R@k."""
        return (self.image_to_text <= k).astype(np.float64)

    def text_hits(self, k: int) -> NDArray[np.float64]:
        """Return each image's share of the captions that find an image by rank k.

        The shares are scaled so that their mean over the images is R@k over all captions.
        """
        found = (self.text_to_image <= k).astype(np.float64)
        if self.owner is None:
            return found
        images = len(self.image_to_text)
        counts = np.bincount(self.owner, found, minlength=images).astype(np.float64)
        scaled: NDArray[np.float64] = counts * (images / len(found))
        return scaled

    def hits(self, k: int) -> NDArray[np.float64]:
        """Return for each image the mean over both directions; its mean is R@k of both."""
        return (self.image_hits(k) + self.text_hits(k)) / 2


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


def retrieval(
    image_embeddings: NDArray[Any],
    text_embeddings: NDArray[Any],
    relevance: Relevance | None = None,
) -> Retrieval:
    """Measure retrieval between images and texts.

    Args:
        image_embeddings: floats [N, dim].
        text_embeddings: floats [M, dim].
        relevance: which texts are right for which images, best from the captions themselves
            (`Relevance.of_captions`); None where image i belongs to text i (M = N): texts with
            the same embedding then count as equal captions.

    Raises:
        InputError: shapes that do not fit, NaN or infinity, an embedding of length 0, or texts of
            which every one is right for every image.
    """
    if relevance is None and np.ndim(text_embeddings) == 2:
        paired_unit_rows(image_embeddings, text_embeddings)  # or the messages would be of numpy
        relevance = Relevance.of_texts_embedded(text_embeddings)
    if relevance is not None and relevance.tells_nothing:
        raise InputError(
            "every text is right for every image, so retrieval says nothing: give captions that "
            "tell the images apart, and check that the text tower does"
        )
    return retrieval_of_ranks(pair_ranks(image_embeddings, text_embeddings, relevance))


def pair_ranks(
    image_embeddings: NDArray[Any],
    text_embeddings: NDArray[Any],
    relevance: Relevance | None = None,
) -> Ranks:
    """Rank the best placed right answer to each query, in both directions.

    Without `relevance` text i alone is right for image i, even where embeddings are equal.

    Raises:
        InputError: as `retrieval`.
    """
    if relevance is None:
        images, texts = paired_unit_rows(image_embeddings, text_embeddings)
        relevance = Relevance.of_pairs(len(images))
    else:
        images = unit_rows(image_embeddings, "image embeddings")
        texts = unit_rows(text_embeddings, "text embeddings")
        wanted = (relevance.images, len(relevance.owner), images.shape[1])
        if (len(images), len(texts), texts.shape[1]) != wanted:
            raise InputError(
                f"image embeddings {images.shape} and text embeddings {texts.shape} are not "
                f"those of {wanted[0]} images with {wanted[1]} captions"
            )
    return Ranks(
        _ranks(images, texts, relevance.of_images),
        _ranks(texts, images, relevance.of_texts),
        relevance.owner,
    )


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
    every = np.arange(len(classes))
    return _ranks(images, classes, lambda part: right[part, None] == every)


def _ranks(
    queries: NDArray[np.float64],
    targets: NDArray[np.float64],
    right_of: Callable[[slice], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """Count for each query the wrong targets that score as high as the best right one, and 1.

    `right_of` tells for some queries which targets are right, bool [queries, targets].
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    chunk = max(1, _SCORES_AT_ONCE // len(targets))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        scores, right = queries[part] @ targets.T, right_of(part)
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[part] = 1 + ((scores >= best - TIE) & ~right).sum(axis=1)
    return ranks


def _direction(ranks: NDArray[np.int64]) -> DirectionMetrics:
    return DirectionMetrics(
        r1=float((ranks <= 1).mean()),
        r5=float((ranks <= 5).mean()),
        r10=float((ranks <= 10).mean()),
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
    )
