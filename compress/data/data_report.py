"""Judge image-text pairs before they are trained on: what is wrong with which, and what to keep."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.data.near_duplicates import NearDuplicates
from edgeclip.compress.data.picture_statistics import PictureStatistics
from edgeclip.compress.data.sources import Source
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.relevance import caption_key
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share

_BLOCK = 4096  # pictures at a time
_SAMPLE = 100_000  # pictures of which an interval is taken: more would not narrow it visibly
# The median absolute deviation of a normal distribution is this share of its standard deviation.
_MAD = 0.6745
# Of pictures, the share that must agree more with their own caption than with another's, or the
# teacher does not know such pairs, and what it says of them decides nothing. Half is chance.
_KNOWN = 0.6

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CaptionStatistics:
    """All captions of a source, M of them in the order of their pictures.

    Attributes:
        owner: the picture of each, int64 [M].
        tokens: the length in tokens of the teacher with start and end, int32 [M].
        key: a hash of `relevance.caption_key` of the text, equal for equal captions, uint64 [M].
        limit: the tokens that the teacher reads; longer captions are cut.
    """

    owner: NDArray[np.int64]
    tokens: NDArray[np.int32]
    key: NDArray[np.uint64]
    limit: int

    def __len__(self) -> int:
        return len(self.owner)

    def repeated(self, pictures: int) -> NDArray[np.int64]:
        """Return how many pictures have the most common caption of each picture: int64 [pictures].

        It is 1 for a caption that no other picture has, and 0 without captions.
        """
        found = np.zeros(pictures, np.int64)
        if len(self):
            # A picture that says the same twice counts once.
            both = np.unique(np.stack([self.key, self.owner.astype(np.uint64)]), axis=1)
            _, where, counts = np.unique(both[0], return_inverse=True, return_counts=True)
            np.maximum.at(found, both[1].astype(np.int64), counts[where])
        return found

    def most_repeated(self, most: int) -> list[tuple[int, int]]:
        """Return captions that several pictures have, the most common first.

        Each is the place of its first appearance, and how many pictures have it.
        """
        if not len(self):
            return []
        both = np.stack([self.key, self.owner.astype(np.uint64)])
        _, once = np.unique(both, axis=1, return_index=True)
        once = np.sort(once)
        _, first, counts = np.unique(self.key[once], return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))[:most]
        return [(int(once[first[at]]), int(counts[at])) for at in order if counts[at] > 1]


def caption_statistics(
    source: Source, count_tokens: Callable[[Sequence[str]], Sequence[int]], limit: int
) -> CaptionStatistics:
    """Measure all captions of a source.

    Args:
        source: the pairs; some pictures may have no captions.
        count_tokens: counts the tokens of texts, uncut.
        limit: the tokens that the teacher reads.
    """
    owner, tokens, keys = [], [], []
    with tqdm(total=len(source), desc="captions", unit="img", dynamic_ncols=True) as bar:
        for first in range(0, len(source), _BLOCK):
            part = range(first, min(first + _BLOCK, len(source)))
            own = [source.captions(index) for index in part]
            texts = [text for given in own for text in given]
            counts = np.array([len(given) for given in own])
            owner.append(np.repeat(np.arange(part.start, part.stop), counts))
            tokens.append(np.array(count_tokens(texts) if texts else (), np.int32))
            keys.append(np.array([_key(text) for text in texts], np.uint64))
            bar.update(len(part))
    return CaptionStatistics(
        np.concatenate(owner).astype(np.int64), np.concatenate(tokens), np.concatenate(keys), limit
    )


def _key(text: str) -> int:
    plain = caption_key(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class CaptionAgreement:
    """How well pictures and captions agree, as the teacher sees it.

    Attributes:
        own: cosine of each picture to the caption that fits it best (CLIPScore of Hessel et al.
            2021, unscaled), float32 [N]; NaN where there is none.
        other: cosine to the first caption of another picture, drawn by chance; NaN likewise.
        own_wins: the share of pictures whose own caption agrees better than that other one.
    """

    own: Floats
    other: Floats
    own_wins: Interval | None

    @property
    def is_known(self) -> bool:
        """Whether the teacher tells captions of these pictures from those of others."""
        return self.own_wins is not None and self.own_wins.value >= _KNOWN

    def floor(self, deviations: float) -> float:
        """Return the cosine below which a pair is far below the rest.

        It is the median less so many robust standard deviations, the median absolute deviation over
        0.6745: the modified z-score of Iglewicz and Hoaglin (1993), who recommend 3.5. Where that
        is more, it is the cosine that 5% of pairs drawn by chance reach: no pair is far below that
        fits better than nearly all wrong ones. Minus infinity where half of all agree equally.
        """
        known = self.own[~np.isnan(self.own)].astype(np.float64)
        wrong = self.other[~np.isnan(self.other)]
        if not len(known) or not len(wrong):
            return -np.inf
        middle = float(np.median(known))
        spread = float(np.median(np.abs(known - middle)))
        if not spread:
            return -np.inf
        return min(middle - deviations * spread / _MAD, float(np.percentile(wrong, 95)))


class Embeddings(Protocol):
    """Embeddings of pictures and captions, L2-normalised, such as a `TeacherCache`."""

    def image(self, indices: Sequence[int], /) -> NDArray[np.float16]:
        """Return those of some pictures, float16 [N, dim]."""

    def text(self, indices: Sequence[int], numbers: int = 0, /) -> NDArray[np.float16]:
        """Return those of one caption of each of some pictures, by its number."""


def agreement(
    teacher: Embeddings,
    rows: NDArray[np.int64],
    captions: CaptionStatistics,
    pictures: int,
    *,
    seed: int = 0,
) -> CaptionAgreement:
    """Compare pictures with their own captions and with those of others.

    Args:
        teacher: the embeddings, which are read some at a time.
        rows: the indices of the pictures that have any, int64 [K].
        captions: of all pictures of the source.
        pictures: how many pictures the source has.
        seed: of what is drawn by chance.
    """
    own, other = np.full((2, pictures), np.nan, np.float32)
    counts = np.bincount(captions.owner, minlength=pictures)
    place = np.flatnonzero(counts[rows] > 0)  # in `rows`, those that have captions
    first_caption = np.cumsum(counts) - counts
    shuffled = np.random.default_rng(seed).permutation(place)
    # Each takes the caption of the next in a random circle, which is never its own.
    next_of = np.empty(len(rows), np.int64)
    next_of[shuffled] = np.roll(shuffled, -1)
    for first in range(0, len(place), _BLOCK):
        at = place[first : first + _BLOCK]
        index = rows[at]
        pictures_of = teacher.image(index.tolist()).astype(np.float32)
        best = np.full(len(index), -np.inf, np.float32)
        for number in range(int(counts[index].max())):
            has = np.flatnonzero(counts[index] > number)
            texts = teacher.text(index[has].tolist(), number).astype(np.float32)
            best[has] = np.maximum(best[has], np.einsum("nd,nd->n", pictures_of[has], texts))
        own[index] = best
        others = teacher.text(rows[next_of[at]].tolist(), 0).astype(np.float32)
        other[index] = np.einsum("nd,nd->n", pictures_of, others)
    index, next_index = rows[place], rows[next_of[place]]
    keys = captions.key[first_caption[index]], captions.key[first_caption[next_index]]
    other[index[keys[0] == keys[1]]] = np.nan  # the same caption by chance
    compared = np.flatnonzero(~np.isnan(own) & ~np.isnan(other))[:_SAMPLE]
    wins = own[compared] > other[compared]
    return CaptionAgreement(own, other, estimate_share(wins).interval if len(wins) else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """What a picture must be to be kept; None asks for nothing.

    Attributes:
        agreement_deviations: how many robust standard deviations a pair may agree worse than the
            median of all, see `Agreement.floor`.
        min_side: the shortest side of the file, pixels.
        max_aspect: the longer side over the shorter.
        min_sharpness, min_contrast, max_noise: see `picture_statistics.measure`.
        min_brightness, max_brightness: likewise, from 0 to 1.
        max_repeated: how many pictures may have one and the same caption.
    """

    agreement_deviations: float | None = 3.5
    min_side: int | None = None
    max_aspect: float | None = None
    min_sharpness: float | None = None
    min_contrast: float | None = None
    max_noise: float | None = None
    min_brightness: float | None = None
    max_brightness: float | None = None
    max_repeated: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value >= 0:
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} must be 0 or above, got {value}"
                )


UNREADABLE, EXACT, NEAR = "cannot be read", "the same file again", "nearly the same picture"
DISAGREES = "caption does not fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Why each picture of a source is left out.

    Attributes:
        reasons: names of reasons.
        reason: the first reason of each picture, by its place in `reasons`; -1 where it is kept.
        same_as: the picture that each is a duplicate of, else its own index; int64 [N].
        near: what is known of near duplicates.
    """

    reasons: tuple[str, ...]
    reason: NDArray[np.int16]
    same_as: NDArray[np.int64]
    near: NearDuplicates

    @property
    def kept(self) -> NDArray[np.int64]:
        """The indices of pictures that are kept, ascending."""
        return np.flatnonzero(self.reason < 0)

    def those(self, reason: str) -> NDArray[np.int64]:
        """The indices of pictures that are left out for a reason, ascending."""
        return np.flatnonzero(self.reason == self.reasons.index(reason))


def judge(
    statistics: PictureStatistics,
    captions: CaptionStatistics | None,
    agreed: CaptionAgreement | None,
    rules: KeepRules,
    compare: Callable[[NDArray[np.int64]], NearDuplicates],
) -> Judgement:
    """Decide which pictures are kept.

    Duplicates come last: a picture that is left out for another reason takes none of its copies
    with it. Of duplicates the largest file is kept, of equal ones the sharpest, then the first.

    Args:
        statistics: of all pictures.
        captions: None if no picture has any.
        agreed: None likewise; it counts only if the teacher knows the pairs.
        rules: what a picture must be.
        compare: finds near duplicates among rows in the order in which they are kept.
    """
    count = len(statistics)
    names, masks = [UNREADABLE], [~statistics.readable]
    _, first, back = np.unique(
        statistics.content.view("S32").reshape(-1), return_index=True, return_inverse=True
    )
    exact = np.where(statistics.readable, first[back], np.arange(count))
    names.append(EXACT)
    masks.append(exact != np.arange(count))
    for name, mask in _broken(statistics, captions, rules):
        names.append(name)
        masks.append(mask)
    if agreed is not None and agreed.is_known and rules.agreement_deviations is not None:
        names.append(DISAGREES)
        masks.append(agreed.own < agreed.floor(rules.agreement_deviations))
    reason = np.full(count, -1, np.int16)
    for place in reversed(range(len(masks))):
        reason[masks[place]] = place
    rows = np.flatnonzero(reason < 0)
    order = np.lexsort((rows, -statistics.sharpness[rows], -statistics.short_side[rows]))
    near = compare(rows[order])
    names.append(NEAR)
    reason[near.same_as != np.arange(count)] = len(names) - 1
    same_as = np.where(near.same_as != np.arange(count), near.same_as, exact)
    return Judgement(reasons=tuple(names), reason=reason, same_as=same_as, near=near)


def _broken(
    statistics: PictureStatistics, captions: CaptionStatistics | None, rules: KeepRules
) -> list[tuple[str, NDArray[np.bool_]]]:
    """The rules that somebody asked for, and which pictures break each."""
    found = []
    aspect = statistics.long_side / statistics.short_side
    for name, values, least, most in (
        ("too small", statistics.short_side, rules.min_side, None),
        ("too long", aspect, None, rules.max_aspect),
        ("too blurred", statistics.sharpness, rules.min_sharpness, None),
        ("too little contrast", statistics.contrast, rules.min_contrast, None),
        ("too noisy", statistics.noise, None, rules.max_noise),
        ("too dark", statistics.brightness, rules.min_brightness, None),
        ("too bright", statistics.brightness, None, rules.max_brightness),
    ):
        if least is not None:
            found.append((name, values < least))
        if most is not None:
            found.append((name, values > most))
    if rules.max_repeated is not None and captions is not None:
        repeated = captions.repeated(len(statistics))
        found.append(("caption of too many pictures", repeated > rules.max_repeated))
    return found
