"""Several sources as one, each with its share of the training samples."""

import functools
import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sampling import Part
from edgeclip.compress.data.sources import Pair, Source, most_captions, subset, without
from edgeclip.runtime.errors import ConfigError


class Mixture:
    """The pairs of several sources, one source behind the other.

    Args:
        sources: at least one, each with a pair.
        weights: the share of each among the training samples, beside those of the others; None
            for all of them lets every picture count alike. They are no part of the identity, since
            they change no pair.

    Attributes:
        sources: the sources.
        parts: their sizes and weights, for `Sampling`.

    Raises:
        ConfigError: weights for some of the sources only, or one that is not above 0.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float | None]) -> None:
        bare = [source.name for source, weight in zip(sources, weights, strict=True) if not weight]
        if bare and any(weight is not None for weight in weights):
            raise ConfigError(
                f"{bare[0]} has no weight above 0: write =WEIGHT behind every --data or behind none"
            )
        self.sources = tuple(sources)
        self._weights = tuple(weights)
        self.parts = tuple(
            Part(len(source), weight) for source, weight in zip(sources, weights, strict=True)
        )
        self._first = np.cumsum([0, *map(len, sources)])
        self.name = " + ".join(source.name for source in sources)
        splits = {source.split for source in sources}
        self.split: Split | None = splits.pop() if len(splits) == 1 else None

    @functools.cached_property
    def identity(self) -> str:
        joined = "\n".join(source.identity for source in self.sources)
        return f"mixture:{hashlib.sha256(joined.encode()).hexdigest()}"

    @functools.cached_property
    def has_captions(self) -> bool:
        return any(source.has_captions for source in self.sources)

    @property
    def most_captions(self) -> int:
        """The most captions of a picture, or more."""
        return max(map(most_captions, self.sources))

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sources[number], index - int(self._first[number])

    def __getitem__(self, index: int) -> Pair:
        source, own = self._place(index)
        return source[own]

    def caption(self, index: int) -> str | None:
        source, own = self._place(index)
        return source.caption(own)

    def captions(self, index: int) -> tuple[str, ...]:
        source, own = self._place(index)
        return source.captions(own)

    def content(self, index: int) -> str:
        """Return the content of a picture; see `Source`."""
        source, own = self._place(index)
        return source.content(own)

    def without(self, numbers: Collection[int]) -> "Mixture":
        """Return the mixture of what is left of each source; one that is left empty is dropped."""
        bad = np.array(sorted(numbers), np.int64)
        owner = np.searchsorted(self._first, bad, side="right") - 1
        kept = [
            (without(source, (bad[owner == number] - self._first[number]).tolist()), weight)
            for number, (source, weight) in enumerate(zip(self.sources, self._weights, strict=True))
            if (owner == number).sum() < len(source)
        ]
        return Mixture([source for source, _ in kept], [weight for _, weight in kept])


def only(source: Source, rows: NDArray[np.int64], *, name: str) -> Source:
    """Return the pairs of a source at some ascending indices; a mixture keeps its weights.

    Raises:
        IndexError: an index that the source does not have.
    """
    if not isinstance(source, Mixture):
        return subset(source, rows, name=name)
    ends = np.searchsorted(rows, np.cumsum([len(own) for own in source.sources])).tolist()
    kept, first, begin = [], 0, 0
    for own, part, end in zip(source.sources, source.parts, ends, strict=True):
        if end > begin:
            few = rows[begin:end] - first
            kept.append((subset(own, few, name=f"{own.name}, {len(few)} of them"), part.weight))
        first, begin = first + len(own), end
    return Mixture([own for own, _ in kept], [weight for _, weight in kept])


def parts_of(source: Source) -> tuple[Part, ...]:
    """Return the parts that a source is sampled by."""
    return source.parts if isinstance(source, Mixture) else (Part(len(source)),)
