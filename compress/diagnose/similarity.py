"""How alike two sets of embeddings or hidden states of the same items are, and their geometry.

Everything is computed in float64. Intervals of figures that are no mean over items come from the
jackknife over `GROUPS` groups of items (delete-d jackknife; Shao and Wu, Annals of Statistics 17,
1989): of CKA and of the geometry, not of mutual information, which has a permutation null instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.student_t import MeanEstimate

GROUPS = 20  # of the jackknife
LEAST_ITEMS = 2 * GROUPS  # so that what is left never has fewer than 38
_BLOCK = 1024


def jackknife(
    value: float, left_out: Values, *, least: float = -math.inf, most: float = math.inf
) -> MeanEstimate:
    """Return a figure with the interval that the same figure without each group gives.

    Args:
        value: the figure of all items.
        left_out: the figure without each of the G groups, [G].
        least, most: bounds of the figure.
    """
    groups = len(left_out)
    squares = float(((left_out - left_out.mean()) ** 2).sum())
    error = math.sqrt(squares * (groups - 1) / groups)
    return MeanEstimate(value, error, groups - 1, least, most)


def _without_groups(count: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the items that are left without each group, drawn by chance."""
    if count < LEAST_ITEMS:
        raise InputError(f"{count} items are too few for an interval: give at least {LEAST_ITEMS}")
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(np.setdiff1d(order, group)) for group in np.array_split(order, GROUPS)]


def jackknifed(
    figure: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    seed: int,
    least: float = -math.inf,
    most: float = math.inf,
) -> MeanEstimate:
    """Estimate a figure of `count` items; `figure` computes it of some of them, int64 [n].

    Raises:
        InputError: fewer than `LEAST_ITEMS` items.
    """
    parts = _without_groups(count, seed)
    return jackknife(
        figure(np.arange(count)), np.array([figure(part) for part in parts]), least=least, most=most
    )


# Layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Cka:
    """Linear CKA of S layers with T layers.

    Attributes:
        values: [S, T], 1 for representations that are the same up to rotation and scale; the
            unbiased estimate, which may lie a little below 0.
        left_out: the same without each group of items, [G, S, T].
    """

    values: Values
    left_out: Values

    def best(self, layer: int) -> tuple[int, MeanEstimate]:
        """Return which of the T layers is most alike to one of the S, and how alike."""
        place = int(self.values[layer].argmax())
        own = self.left_out[:, layer, place]
        return place, jackknife(float(self.values[layer, place]), own, most=1.0)


def linear_cka(first: Sequence[Values], second: Sequence[Values], *, seed: int = 0) -> Cka:
    """Compare every layer of one model with every layer of another by linear CKA.

    CKA (Kornblith et al. 2019, arXiv 1905.00414) with the unbiased estimate of HSIC (Song et al.,
    JMLR 13, 2012, as Nguyen, Raghu and Kornblith 2021 use it), which a width above the number of
    items does not raise: HSIC(K, L) = <K', L'> / (n (n - 3)), with K' and L' the U-centred Gram
    matrices (Szekely and Rizzo, Annals of Statistics 42, 2014).

    Args:
        first, second: hidden states of the same n items, [n, width] each; widths may differ.
        seed: of the groups of the jackknife.

    Raises:
        InputError: fewer than `LEAST_ITEMS` items.
    """
    ours, theirs = ([item @ item.T for item in own] for own in (first, second))
    count = len(ours[0])
    whole = _cka_of(ours, theirs, np.arange(count))
    left_out = [_cka_of(ours, theirs, part) for part in _without_groups(count, seed)]
    return Cka(whole, np.stack(left_out))


def _cka_of(ours: Sequence[Values], theirs: Sequence[Values], rows: NDArray[np.int64]) -> Values:
    mine, other = (
        np.stack([_u_centred(gram[np.ix_(rows, rows)]).ravel() for gram in own])
        for own in (ours, theirs)
    )
    lengths = np.outer(np.linalg.norm(mine, axis=1), np.linalg.norm(other, axis=1))
    found: Values = mine @ other.T / np.maximum(lengths, 1e-300)
    return found


def _u_centred(gram: Values) -> Values:
    """Centre a Gram matrix without its diagonal: each row of the result sums to 0."""
    count = len(gram)
    plain = gram.copy()
    np.fill_diagonal(plain, 0.0)
    rows = plain.sum(axis=1) / (count - 2)
    centred = plain - rows[:, None] - rows[None] + plain.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(centred, 0.0)
    found: Values = centred
    return found


# Embeddings -----------------------------------------------------------------------------------


def neighbour_agreement(first: Values, second: Values, *, neighbours: int = 10) -> Values:
    """Return for each item how many nearest neighbours two embeddings share, above chance: [N].

    1 where all of the `neighbours` nearest other items are the same, 0 for what two unrelated
    embeddings share on average: (o - c) / (1 - c), with o the shared part and c = k / (N - 1) what
    chance gives, as Cohen's kappa corrects agreement.

    Args:
        first, second: L2-normalised embeddings of the same items, [N, dim]; dims may differ.
        neighbours: k, below N - 1.

    Raises:
        InputError: too few items.
    """
    count = len(first)
    if not neighbours < count - 1:
        raise InputError(f"{count} items are too few for {neighbours} neighbours of each")
    shared = np.empty(count)
    for start in range(0, count, _BLOCK):
        near = [_nearest(own, start, neighbours) for own in (first, second)]
        for row, (ours, theirs) in enumerate(zip(*near, strict=True), start):
            shared[row] = len(np.intersect1d(ours, theirs)) / neighbours
    chance = neighbours / (count - 1)
    found: Values = (shared - chance) / (1 - chance)
    return found


def _nearest(rows: Values, start: int, neighbours: int) -> NDArray[np.int64]:
    cosines = rows[start : start + _BLOCK] @ rows.T
    places = np.arange(len(cosines))
    cosines[places, start + places] = -np.inf
    found: NDArray[np.int64] = np.argpartition(-cosines, neighbours, axis=1)[:, :neighbours]
    return found


def modality_gap(image: Values, text: Values) -> float:
    """Return the distance of the mean image embedding to the mean text embedding.

    Liang et al., "Mind the Gap" (2022), section 3; embeddings are L2-normalised [N, dim].
    """
    return float(np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)))


def alignment(image: Values, text: Values) -> Values:
    """Return the squared distance of each picture to its text: [N]; the mean is the alignment.

    Wang and Isola (2020), equation 3 with alpha = 2; small is good.
    """
    found: Values = ((image - text) ** 2).sum(axis=1)
    return found


def uniformity(rows: Values) -> float:
    """Return log of the mean of exp(-2 |x - y|^2) over all pairs of different items.

    Wang and Isola (2020), equation 4 with t = 2; rows are L2-normalised [N, dim]. 0 for a collapsed
    tower, and about -4 for points spread evenly over a sphere of many dimensions.
    """
    count = len(rows)
    total = 0.0
    for start in range(0, count, _BLOCK):
        cosines = np.minimum(rows[start : start + _BLOCK] @ rows.T, 1.0)
        total += float(np.exp(-4 * (1 - cosines)).sum())
    return math.log(max((total - count) / (count * (count - 1)), 1e-300))


# Mutual information ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MutualInformation:
    """Mutual information of two embeddings of the same items, as if they were Gaussian.

    Attributes:
        bits: of the pairs.
        null: the largest of what pairs by chance give, which is what the estimate says of nothing.
        permutations: how often they were drawn.
        shrinkage: Ledoit and Wolf's, 0 (the sample's covariance) to 1 (a multiple of the identity).
        dims: principal components of each side.
    """

    bits: float
    null: float
    permutations: int
    shrinkage: float
    dims: int


def gaussian_information(
    first: Values, second: Values, *, dims: int = 16, permutations: int = 19, seed: int = 0
) -> MutualInformation:
    """Estimate the mutual information of two embeddings under a joint Gaussian.

    Both are reduced to their `dims` first principal components, scaled to unit variance (mutual
    information does not depend on scale), and the joint covariance is shrunk by Ledoit and Wolf's
    formula: I = (log det Sx + log det Sy - log det S) / 2. More dims than the items can tell raise
    the null as much as the estimate. Above the largest of 19 permutations has a chance of 5%.

    Args:
        first, second: embeddings of the same items, [N, dim].
        dims: at most so many components; fewer where the embeddings have less rank.
        permutations: draws of the null.
        seed: of these.
    """
    left, right = _components(first, dims), _components(second, dims)
    width = min(left.shape[1], right.shape[1])
    left, right = left[:, :width], right[:, :width]
    bits, shrinkage = _gaussian_bits(left, right)
    rng = np.random.default_rng(seed)
    drawn = [
        _gaussian_bits(left, right[rng.permutation(len(right))])[0] for _ in range(permutations)
    ]
    return MutualInformation(bits, max(drawn), permutations, shrinkage, width)


def _components(rows: Values, dims: int) -> Values:
    """Return the first principal components of rows, each of variance 1."""
    centred = rows - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((sizes > 1e-6 * max(float(sizes[0]), 1e-12)).sum())
    found: Values = left[:, : max(1, min(dims, rank))] * math.sqrt(len(rows))
    return found


def _gaussian_bits(left: Values, right: Values) -> tuple[float, float]:
    covariance, shrinkage = ledoit_wolf(np.hstack([left, right]))
    width = left.shape[1]
    logs = [
        np.linalg.slogdet(part)[1]
        for part in (covariance[:width, :width], covariance[width:, width:], covariance)
    ]
    return float(logs[0] + logs[1] - logs[2]) / 2 / math.log(2), shrinkage


def ledoit_wolf(rows: Values) -> tuple[Values, float]:
    """Return the shrunk covariance of rows [N, width], and the shrinkage, 0 to 1.

    (1 - s) S + s m I, with S the sample's covariance, m the mean of its diagonal, and s the share
    that minimises the expected squared error (Ledoit and Wolf, J. Multivariate Analysis 88, 2004).
    """
    count, width = rows.shape
    centred = rows - rows.mean(axis=0)
    sample = centred.T @ centred / count
    mean = float(np.trace(sample)) / width
    apart = float(((sample - mean * np.eye(width)) ** 2).sum())
    squares = centred**2
    noise = float((squares.T @ squares / count - sample**2).sum()) / count
    share = 1.0 if apart <= 0 else min(1.0, noise / apart)
    shrunk: Values = (1 - share) * sample + share * mean * np.eye(width)
    return shrunk, share


def as_rows(embeddings: NDArray[Any]) -> Values:
    """Return rows in float64."""
    found: Values = np.asarray(embeddings, np.float64)
    return found
