"""Confidence scores of a student's answers: margin, entropy, agreement of views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.bundle.index import check_matrix
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Tower

# Position of a crop as shares of the margin, and its side as a share of the picture's.
# No view is mirrored: that would turn "left of" into "right of".
_CORNERS = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
_SIDES = (7 / 8, 3 / 4)
_PARTS = tuple((corner, side) for side in _SIDES for corner in _CORNERS)
MAX_VIEWS = len(_PARTS)


def view_pixels(pixels: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Crop `count` parts of each picture and enlarge them to its size.

    The first five are the corners and the centre at 7/8 of the side, the others at 3/4.

    Args:
        pixels: uint8 [N, size, size, 3], as `preprocess.crop_batch` makes them.
        count: 1 to `MAX_VIEWS`.

    Returns:
        uint8 [count, N, size, size, 3].

    Raises:
        InputError: another shape or dtype, or another count.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise InputError(f"pixels must be uint8 [N, size, size, 3], not {pixels.shape}")
    if not 1 <= count <= MAX_VIEWS:
        raise InputError(f"there are 1 to {MAX_VIEWS} views of a picture, not {count}")
    views = np.empty((count, *pixels.shape), dtype=np.uint8)
    for number, picture in enumerate(map(Image.fromarray, pixels)):
        for view, part in enumerate(_PARTS[:count]):
            views[view, number] = _enlarged(picture, *part)
    return views


def embed_views(
    embed: Callable[[NDArray[np.uint8]], NDArray[Any]], pixels: NDArray[np.uint8], count: int
) -> NDArray[np.float32] | None:
    """Embed the views of pictures; float32 [count, N, dim], or None for no views.

    Args:
        embed: uint8 [M, size, size, 3] -> [M, dim], such as `Encoder.encode_pixels`.
        pixels: uint8 [N, size, size, 3].
        count: how many views; 0 for none.

    Raises:
        InputError: see `view_pixels`.
    """
    if count == 0:
        return None
    views = view_pixels(pixels, count)
    flat = embed(views.reshape(-1, *pixels.shape[1:]))
    return np.asarray(flat, dtype=np.float32).reshape(count, len(pixels), -1)


def _enlarged(picture: Image.Image, corner: Sequence[float], share: float) -> NDArray[np.uint8]:
    """Crop a square part and resize it to the whole picture's size."""
    left_over = picture.width * (1 - share)
    left, upper = corner[0] * left_over, corner[1] * left_over
    side = picture.width * share
    box = (left, upper, left + side, upper + side)
    return np.asarray(picture.resize(picture.size, Image.Resampling.BICUBIC, box=box))


@dataclass(frozen=True, slots=True, eq=False)
class Similarities:
    """Cosines of N queries, and of altered views of them, from which scores are computed.

    Attributes:
        cosines: float64 [N, K], of each query with the K >= 2 entries it is compared with: the
            texts or pictures of an index, or the labels of a set.
        view_cosines: float64 [V, N, K], the same for V altered views of each query; V may be 0.
        likeness: float64 [V, N], cosine of each view's embedding with the query's own.

    Raises:
        InputError: shapes that do not fit, NaN or infinity, or fewer than two entries.
    """

    cosines: Values
    view_cosines: Values
    likeness: Values

    def __post_init__(self) -> None:
        check_matrix(self.cosines, "cosines of queries with entries")
        views = len(self.view_cosines)
        if self.cosines.shape[1] < 2:
            raise InputError("a choice needs two entries or more: give a larger index or label set")
        if self.view_cosines.shape[1:] != self.cosines.shape or self.likeness.shape != (
            views,
            len(self.cosines),
        ):
            raise InputError("the views' cosines do not fit those of the queries")

    @classmethod
    def between(
        cls, queries: NDArray[Any], entries: NDArray[Any], views: NDArray[Any] | None = None
    ) -> "Similarities":
        """Compare embeddings of queries with those of the entries.

        Args:
            queries: floats [N, dim], L2-normalised.
            entries: floats [K, dim], L2-normalised, of the same embedding space.
            views: floats [V, N, dim], embeddings of altered views of the queries (see
                `view_pixels`), for a score that needs them.

        Raises:
            InputError: see the class, or dimensions that differ.
        """
        check_matrix(queries, "queries")
        if entries.shape[1:] != queries.shape[1:]:
            raise InputError(
                f"queries have shape {queries.shape}, entries {entries.shape}: take both from one "
                "embedding space"
            )
        seen = np.zeros((0, *queries.shape), queries.dtype) if views is None else views
        # In the embeddings' own precision: an index is too large to be widened for each query.
        found = (queries @ entries.T, seen @ entries.T, np.einsum("vnd,nd->vn", seen, queries))
        return cls(*(item.astype(np.float64) for item in found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """Largest cosine minus the second largest: 0 where two entries tie, at most 2."""

    kind: Literal["margin"] = "margin"

    @property
    def views(self) -> int:
        """Number of altered views needed of each query, each one more run of the student."""
        return 0

    def of(self, similarities: Similarities) -> Values:
        """Score each query: float64 [N]."""
        best = np.partition(similarities.cosines, -2, axis=1)[:, -2:]
        margin: Values = best[:, 1] - best[:, 0]
        return margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropy:
    """1 - H(p) / log K, with p = softmax(logit_scale x cosines) over K entries and H its entropy.

    0 if all entries are equal, 1 if one entry has all of the softmax.

    Attributes:
        logit_scale: factor from cosine to logit, as `EncoderSpec.logit_scale`.
    """

    logit_scale: float
    kind: Literal["entropy"] = "entropy"

    def __post_init__(self) -> None:
        if not 0 < self.logit_scale < np.inf:
            raise ValueError(f"logit_scale must be positive and finite, got {self.logit_scale}")

    @property
    def views(self) -> int:
        """Number of altered views needed of each query."""
        return 0

    def of(self, similarities: Similarities) -> Values:
        """Score each query: float64 [N]."""
        logits = self.logit_scale * similarities.cosines
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits)
        total = weights.sum(axis=1)
        # H = log(sum of weights) - mean logit: no logarithm of a weight that rounded to 0.
        entropy = np.log(total) - (weights * logits).sum(axis=1) / total
        sureness: Values = 1 - entropy / np.log(logits.shape[1])
        return sureness


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of altered views with the query itself; pictures only.

    "answer" is the share of views with the same best entry as the query; "embedding" the mean
    cosine of the views' embeddings with the query's, which needs no entries. Each view is a
    whole run of the student, so an answer costs 1 + `views` runs.

    Attributes:
        views: number of views, 1 to `MAX_VIEWS`; see `view_pixels`.
        measure: what is compared.
    """

    views: int = 4
    measure: Literal["answer", "embedding"] = "embedding"
    kind: Literal["agreement"] = "agreement"

    def __post_init__(self) -> None:
        if not 1 <= self.views <= MAX_VIEWS:
            raise ValueError(f"views must be 1 to {MAX_VIEWS}, got {self.views}")

    def of(self, similarities: Similarities) -> Values:
        """Score each query: float64 [N].

        Raises:
            InputError: the similarities have another number of views.
        """
        if len(similarities.likeness) != self.views:
            raise InputError(
                f"the score needs {self.views} views, but {len(similarities.likeness)} "
                "were embedded: embed as many as the score's `views`"
            )
        if self.measure == "embedding":
            return np.asarray(similarities.likeness.mean(axis=0))
        same = similarities.view_cosines.argmax(axis=2) == similarities.cosines.argmax(axis=1)
        return np.asarray(same.mean(axis=0))


Score = Margin | Entropy | Agreement


def check_score(score: Score, query: Tower) -> None:
    """Raise if a score cannot be computed for such queries.

    Raises:
        InputError: views of a text.
    """
    if query == "text" and score.views:
        raise InputError("only pictures have altered views: choose margin or entropy for texts")
