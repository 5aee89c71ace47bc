"""Concept scores: whether a picture fits its caption better than the same caption with one word
changed, for words that exclude each other, such as colours.

Of a picture's caption with exactly one word of a family, a caption is made with each other word of
the family in its place, and the picture has to choose (as ARO of Yuksekgonul et al. 2023 and
SugarCrepe of Hsieh et al. 2023 change words). All is judged in one set of text embeddings, so that
the score is one of the image tower.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Values

# Words that exclude each other; colours are the basic terms of Berlin and Kay (1969), and teal.
FAMILIES: dict[str, tuple[str, ...]] = {
    "colour": (
        *("black", "white", "red", "green", "yellow", "blue", "brown", "orange"),
        *("pink", "purple", "grey", "teal"),
    ),
    "position": ("above", "below", "left of", "right of"),
    "size": ("small", "large"),
    "number": ("one", "two", "three", "four", "five"),
}
_GRAY = re.compile(r"\bgray\b", re.IGNORECASE)  # one word with grey
_LEAST = 5  # captions with a word
_MOST = 400  # pictures of a family


@dataclass(frozen=True, slots=True, eq=False)
class ConceptQuestions:
    """Pictures and the captions that each chooses from.

    Attributes:
        family: what the words are of.
        words: K words.
        rows: which pictures, int64 [Q].
        right: the word of each picture's own caption, int64 [Q].
        prompts: K captions for each picture, in the order of `words`.
    """

    family: str
    words: tuple[str, ...]
    rows: NDArray[np.int64]
    right: NDArray[np.int64]
    prompts: tuple[str, ...]

    def choices(self, image: Values, texts: Values) -> NDArray[np.int64]:
        """Return the word that each picture fits best, int64 [Q].

        Args:
            image: embeddings of all pictures, L2-normalised [N, dim].
            texts: those of `prompts`, [Q * K, dim].
        """
        own = texts.reshape(len(self.rows), len(self.words), -1)
        found: NDArray[np.int64] = np.einsum("qd,qkd->qk", image[self.rows], own).argmax(axis=1)
        return found


def concept_questions(
    captions: Sequence[str],
    *,
    seed: int = 0,
    fits: Callable[[str], bool] = lambda _: True,
) -> tuple[ConceptQuestions, ...]:
    """Make the questions of each family that the captions have two words of, at least.

    A word counts if `_LEAST` captions have it alone of its family. At most `_MOST` pictures are
    asked about, drawn by `seed`.

    Args:
        captions: one of each picture.
        seed: of the draw.
        fits: whether a caption is short enough for the text tower.
    """
    captions = [_GRAY.sub("grey", caption) for caption in captions]
    found = []
    for number, (family, known) in enumerate(FAMILIES.items()):
        pattern = re.compile(rf"\b({'|'.join(known)})\b", re.IGNORECASE)
        said = [pattern.findall(caption) for caption in captions]
        lone = [own[0].lower() if len(own) == 1 else "" for own in said]
        words = tuple(word for word in known if lone.count(word) >= _LEAST)
        rows = np.array([at for at, word in enumerate(lone) if word in words], np.int64)
        rows = rows[[fits(captions[at]) for at in rows.tolist()]] if len(rows) else rows
        if len(words) < 2 or not len(rows):
            continue
        if len(rows) > _MOST:
            rng = np.random.default_rng((seed, number))
            rows = np.sort(rng.choice(rows, _MOST, replace=False))
        prompts = [pattern.sub(word, captions[at]) for at in rows.tolist() for word in words]
        right = np.array([words.index(lone[at]) for at in rows.tolist()], np.int64)
        found.append(ConceptQuestions(family, words, rows, right, tuple(prompts)))
    return tuple(found)
