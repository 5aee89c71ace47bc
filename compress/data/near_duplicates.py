"""Find pictures that are nearly the same, by the teacher's embeddings and by small thumbnails."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from edgeclip.compress.data.sources import Source
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share

_BLOCK = 2048  # pictures that are compared at a time
_PROBED = 512  # pictures that are compared with all others, to tell what was missed
_ROUNDS = 2  # of cells, each around other pictures
_COPIED = 256  # pictures that are compared with copies of themselves
_COPY_SIDE, _COPY_QUALITY = 0.75, 75  # of a copy: its side as a share, and its quality as a JPEG
# Of thumbnails. Copies have 0.99 and more; pictures that a teacher merely takes for each other,
# such as a lemon and a tennis ball, mostly less than 0.9.
_CORRELATION = 0.9
_FLAT = 1.0  # standard deviation in levels, below which a thumbnail shows nothing
_LEAST, _MOST = 0.9, 0.9999  # no threshold is beyond, whatever the copies say

Embed = Callable[[Sequence[Image.Image]], FloatArray]  # pictures -> float32 [N, dim]


def copies_cosine(
    source: Source, indices: Sequence[int], embed: Embed, *, side: int, batch: int = 32
) -> float:
    """Return the cosine that 95% of pictures have at least to a smaller and compressed copy.

    It is the threshold of `near_duplicates` where none is given: two pictures are duplicates if the
    model finds them as alike as a picture and its copy. It lies between 0.9 and 0.9999.

    Args:
        source: the pictures.
        indices: those that may be taken, one at least, of which at most 256 are, evenly.
        embed: embeds pictures.
        side: pixels that the model sees; no copy is made smaller, for it would be scaled up again.
        batch: pictures at a time.
    """
    places = np.linspace(0, len(indices) - 1, _COPIED).astype(int)
    chosen = [indices[at] for at in np.unique(places).tolist()]
    found = []
    for first in range(0, len(chosen), batch):
        pictures = [source[index].image for index in chosen[first : first + batch]]
        found.append(cosines(embed(pictures), embed([_copy(one, side) for one in pictures])))
    least = float(np.percentile(np.concatenate(found), 5))
    return min(max(least, _LEAST), _MOST)


def _copy(picture: Image.Image, side: int) -> Image.Image:
    """Compress a smaller picture as a JPEG, as sites do that show pictures of others."""
    scale = max(_COPY_SIDE, min(1.0, side / min(picture.size)))
    width, height = (max(1, round(scale * own)) for own in picture.size)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=_COPY_QUALITY
    )
    return Image.open(buffer).convert("RGB")


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Which pictures are nearly the same as another that is kept.

    Attributes:
        same_as: int64 [M], the row of the kept picture that each is a duplicate of; its own row
            where it is kept, or was not compared.
        cosine: float32 [M], to the row that it was found beside; 1 where it is kept.
        compared: how many of the N (N - 1) / 2 pairs were compared, as a share.
        found: the share of duplicates that was found, of some pictures that were compared with all
            others; None where all pairs were compared, or none of these is a duplicate.
    """

    same_as: NDArray[np.int64]
    cosine: NDArray[np.float32]
    compared: float
    found: Interval | None

    @property
    def is_exact(self) -> bool:
        """Whether all pairs were compared."""
        return self.compared >= 1.0


def near_duplicates(
    embeddings: NDArray[np.float16],
    thumbnails: NDArray[np.uint8],
    rows: NDArray[np.int64],
    threshold: float,
    *,
    most_exact: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> NearDuplicates:
    """Keep each picture unless one that was kept before is nearly the same.

    It is if the cosine of their embeddings is at least `threshold`, and the correlation of their
    thumbnails at least 0.9, or both thumbnails are flat: a teacher finds pictures alike that show
    different things, where it does not know them. No chain of small changes joins pictures that
    differ, since whatever is left out is nearly the same as one that is kept.

    Up to `most_exact` pictures all pairs are compared, which takes N^2 dim / 2 products. Of more,
    only pictures in the same cell are: those nearest to one of sqrt(N) pictures drawn by chance,
    twice (the inverted file of Jegou et al. 2011), about N^1.5 dim products. What that misses is
    estimated.

    Args:
        embeddings: float16 [M, dim], L2-normalised.
        thumbnails: of the same pictures, uint8 [M, pixels].
        rows: the N rows to compare, in the order in which pictures are kept.
        threshold: the least cosine of duplicates.
        most_exact: the most pictures of which all pairs are compared, and the most in a cell.
        device: of torch, where the products are computed.
        seed: of what is drawn by chance.
    """
    same_as, cosine = np.arange(len(embeddings)), np.ones(len(embeddings), np.float32)
    state = _State(embeddings, thumbnails, threshold, device, same_as, cosine)
    count = len(rows)
    if count <= most_exact:
        state.compare(rows, told="duplicates")
        return NearDuplicates(same_as=same_as, cosine=cosine, compared=1.0, found=None)
    rng = np.random.default_rng(seed)
    pairs = 0.0
    for turn in range(_ROUNDS):
        left = rows[same_as[rows] == rows]
        told = f"duplicates, round {turn + 1} of {_ROUNDS}"
        cells = list(_cells(state, left, rng, most_exact))
        for cell in tqdm(cells, desc=told, unit="cell", dynamic_ncols=True):
            state.compare(cell)
            pairs += len(cell) * (len(cell) - 1) / 2
    while not (same_as[same_as] == same_as).all():
        # What a picture was found to be the same as may have been left out in a later round.
        same_as[:] = same_as[same_as]
    return NearDuplicates(
        same_as=same_as,
        cosine=cosine,
        compared=min(pairs / (count * (count - 1) / 2), np.nextafter(1, 0)),
        found=_found(state, rows, rng),
    )


@dataclass(frozen=True, slots=True)
class _State:
    """What is compared, by which threshold, where, and what was found so far."""

    embeddings: NDArray[np.float16]
    thumbnails: NDArray[np.uint8]
    threshold: float
    device: torch.device | str
    same_as: NDArray[np.int64]
    cosine: NDArray[np.float32]

    def tensor(self, rows: NDArray[np.int64]) -> Tensor:
        """Rows of length 1, float32: float16 rounds lengths off 1."""
        found = torch.from_numpy(self.embeddings[rows]).to(self.device).float()
        return torch.nn.functional.normalize(found, dim=-1)

    def look_alike(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell whether the thumbnails of each pair look alike, or both show nothing: bool [N]."""
        one, other = (self.thumbnails[part].astype(np.float32) for part in (rows, others))
        one -= one.mean(axis=1, keepdims=True)
        other -= other.mean(axis=1, keepdims=True)
        spread, spread_of_other = one.std(axis=1), other.std(axis=1)
        flat = (spread < _FLAT) & (spread_of_other < _FLAT)
        shown = (spread >= _FLAT) & (spread_of_other >= _FLAT)
        products = np.einsum("np,np->n", one, other) / one.shape[1]
        found: NDArray[np.bool_] = products >= _CORRELATION * spread * spread_of_other
        alike: NDArray[np.bool_] = flat | (shown & found)
        return alike

    def compare(self, rows: NDArray[np.int64], *, told: str | None = None) -> None:
        """Compare all pairs of `rows`, and enter what is found."""
        kept: list[NDArray[np.int64]] = []
        hidden = told is None
        bar = tqdm(total=len(rows), desc=told, unit="img", dynamic_ncols=True, disable=hidden)
        with bar, torch.inference_mode():
            for first in range(0, len(rows), _BLOCK):
                block = rows[first : first + _BLOCK]
                left = self._unlike_those(block, kept)
                kept = _joined(kept, self._unlike_each_other(left))
                bar.update(len(block))

    def _unlike_those(
        self, block: NDArray[np.int64], kept: list[NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Enter the rows that are duplicates of kept ones, and return the others."""
        if not kept:
            return block
        ours = self.tensor(block)
        best = np.full(len(block), -np.inf, np.float32)
        nearest = np.zeros(len(block), np.int64)
        for others in kept:
            values, places = (ours @ self.tensor(others).T).max(dim=1)
            value = values.cpu().numpy()
            better = value > best
            best[better], nearest[better] = value[better], others[places.cpu().numpy()[better]]
        same = best >= self.threshold
        same[same] = self.look_alike(block[same], nearest[same])
        self.same_as[block[same]], self.cosine[block[same]] = nearest[same], best[same]
        return block[~same]

    def _unlike_each_other(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Enter the rows that are duplicates of earlier ones, and return the others."""
        ours = self.tensor(rows)
        products = (ours @ ours.T).cpu().numpy()
        stays = np.ones(len(rows), bool)
        for at in np.flatnonzero((np.tril(products, -1) >= self.threshold).any(axis=1)).tolist():
            near = np.flatnonzero(stays[:at] & (products[at, :at] >= self.threshold))
            near = near[self.look_alike(np.repeat(rows[at], len(near)), rows[near])]
            if len(near):
                nearest = near[products[at, near].argmax()]
                stays[at] = False
                self.same_as[rows[at]] = rows[nearest]
                self.cosine[rows[at]] = products[at, nearest]
        return rows[stays]


def _joined(kept: list[NDArray[np.int64]], more: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Add rows to blocks that are all full but the last."""
    if kept and len(kept[-1]) < _BLOCK:
        *kept, last = kept
        more = np.concatenate([last, more])
    return [*kept, *(more[at : at + _BLOCK] for at in range(0, len(more), _BLOCK))]


def _cells(
    state: _State, rows: NDArray[np.int64], rng: np.random.Generator, most: int
) -> Iterator[NDArray[np.int64]]:
    """Split rows by the nearest of sqrt(N) of them, into cells of at most `most`, in order."""
    number = min(len(rows), max(2, round(len(rows) ** 0.5)))
    nearest = np.empty(len(rows), np.int64)
    with torch.inference_mode():
        centres = state.tensor(rng.choice(rows, number, replace=False))
        for first in range(0, len(rows), _BLOCK):
            products = state.tensor(rows[first : first + _BLOCK]) @ centres.T
            nearest[first : first + _BLOCK] = products.argmax(dim=1).cpu().numpy()
    order = np.argsort(nearest, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(nearest[order])) + 1):
        for first in range(0, len(places), most):
            yield rows[places[first : first + most]]


def _found(state: _State, rows: NDArray[np.int64], rng: np.random.Generator) -> Interval | None:
    """Estimate the share of duplicates that were found, on some pictures compared with all."""
    probed = np.sort(rng.choice(len(rows), min(_PROBED, len(rows)), replace=False))
    is_kept = state.same_as[rows] == rows
    missed = np.zeros(len(probed), bool)
    with torch.inference_mode():
        ours = state.tensor(rows[probed])
        for first in range(0, len(rows), _BLOCK):
            places = np.arange(first, min(first + _BLOCK, len(rows)))
            products = (ours @ state.tensor(rows[places]).T).cpu().numpy()
            earlier = is_kept[places] & (places < probed[:, None])
            ours_at, others_at = np.nonzero((products >= state.threshold) & earlier)
            alike = state.look_alike(rows[probed[ours_at]], rows[places[others_at]])
            missed[ours_at[alike]] = True
    hits = ~is_kept[probed]
    counted = hits | missed
    return estimate_share(hits[counted]).interval if counted.any() else None
