"""Which texts are right for which images, where captions repeat and images have several.

A text is right for an image if it is one of the image's captions, or equal to one of them. Equal
are captions of the same words: after Unicode NFC, case folding, and with every run of white space
as one space, which are also the differences that CLIP's own tokenizer removes.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError


def caption_key(caption: str) -> str:
    """Return what equal captions have in common."""
    folded = unicodedata.normalize("NFC", caption).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """Which of M texts are right for which of N images.

    Attributes:
        images: N.
        owner: int64 [M], the image that each text is a caption of, 0 to N - 1.
        group: int64 [M], equal for equal captions, from 0 without a gap.

    Raises:
        InputError: an image without a text, or arrays that do not fit.
    """

    images: int
    owner: NDArray[np.int64]
    group: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.owner.ndim != 1 or self.owner.shape != self.group.shape:
            raise InputError("relevance needs an image and a group for each text")
        if not np.array_equal(np.unique(self.owner), np.arange(self.images)):
            raise InputError("every image needs a caption, and every caption an image")

    @classmethod
    def of_captions(cls, captions: Sequence[Sequence[str]]) -> "Relevance":
        """Compute the relevance of each image's captions, in the order of the images."""
        owner = [image for image, own in enumerate(captions) for _ in own]
        keys = [caption_key(caption) for own in captions for caption in own]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        group = [places[key] for key in keys]
        return cls(len(captions), np.array(owner, np.int64), np.array(group, np.int64))

    @classmethod
    def of_pairs(cls, count: int) -> "Relevance":
        """Return the relevance of pairs of which no two captions are equal."""
        own = np.arange(count, dtype=np.int64)
        return cls(count, own, own)

    @classmethod
    def of_texts_embedded(cls, texts: NDArray[Any]) -> "Relevance":
        """Take pairs whose texts [N, dim] have the same embedding, bit for bit, for equal captions.

        It cannot tell equal captions from a text tower that gives different ones one embedding, so
        this is for embeddings that are known to be good.
        """
        _, group = np.unique(texts, axis=0, return_inverse=True)
        return cls(len(texts), np.arange(len(texts)), group.reshape(-1).astype(np.int64))

    @property
    def tells_nothing(self) -> bool:
        """Whether every text is right for every image, so that no answer can be wrong."""
        groups = int(self.group.max()) + 1
        held = np.unique(self.owner * groups + self.group)
        return self.images > 1 and len(held) == self.images * groups

    @property
    def chance(self) -> float:
        """R@1 of embeddings that mean nothing, expected: the mean of both directions."""
        groups = int(self.group.max()) + 1
        held = np.unique(self.owner * groups + self.group)
        texts_of = np.bincount(self.group)[held % groups]
        right_texts = np.bincount(held // groups, texts_of).mean() / len(self.group)
        right_images = np.bincount(held % groups)[self.group].mean() / self.images
        return float(right_texts + right_images) / 2

    def of_images(self, part: slice) -> NDArray[np.bool_]:
        """Tell for some images which texts are right: bool [images, M]."""
        start, stop, _ = part.indices(self.images)
        chosen = (self.owner >= start) & (self.owner < stop)
        held = np.zeros((stop - start, int(self.group.max()) + 1), dtype=np.bool_)
        held[self.owner[chosen] - start, self.group[chosen]] = True
        return held[:, self.group]

    def of_texts(self, part: slice) -> NDArray[np.bool_]:
        """Tell for some texts which images are right: bool [texts, N]."""
        groups, rows = np.unique(self.group[part], return_inverse=True)
        chosen = np.isin(self.group, groups)
        held = np.zeros((len(groups), self.images), dtype=np.bool_)
        held[np.searchsorted(groups, self.group[chosen]), self.owner[chosen]] = True
        return held[rows]
