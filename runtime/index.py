"""An index of embeddings by key, with exact search."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.embeddings import check_keyed, check_space, check_unit_rows, text_tuple
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.npz import read_npz, write_npz

_KIND = "edgeclip-index-1"
_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32


@dataclass(frozen=True, slots=True)
class Hit:
    """A key of an index and its cosine with the query."""

    key: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Keys (paths, say) and one embedding for each.

    `embeddings` is float32 [N, dim], L2-normalised, made in the embedding space whose
    fingerprint is `space`.
    """

    keys: tuple[str, ...]
    embeddings: NDArray[np.float32]
    space: str

    def __post_init__(self) -> None:
        """Check keys and embeddings.

        Raises:
            InputError: repeated or empty keys, or embeddings that do not fit them.
        """
        check_keyed("index", self.keys, self.embeddings, self.space)

    def search(
        self, queries: NDArray[Any], top: int = 10, *, space: str | None = None
    ) -> tuple[tuple[Hit, ...], ...]:
        """Find the `top` keys of highest cosine for each query, best first.

        The search is exact. Equal scores come in the order of the index; an index smaller
        than `top` gives all it has. Memory is bounded by chunks of queries.

        Args:
            queries: floats [Q, dim], L2-normalised.
            top: how many hits to give, at least 1.
            space: fingerprint of the queries' embedding space; give it wherever it is known.

        Raises:
            SpaceMismatchError: `space` is not the index's.
            InputError: another shape, NaN, rows not L2-normalised, or `top` below 1.
        """
        if space is not None:
            self.check_space(space)
        check_unit_rows(queries, "queries")
        if queries.shape[1] != self.embeddings.shape[1]:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions, the index has "
                f"{self.embeddings.shape[1]}: use the encoder that made the index"
            )
        if top < 1:
            raise InputError(f"top is {top}: ask for at least 1 hit")
        return tuple(
            tuple(Hit(self.keys[row], float(scores[row])) for row in _best(scores, top))
            for scores in self._scores(queries.astype(np.float32, copy=False))
        )

    def _scores(self, queries: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Yield the scores [N] of one query after the other."""
        chunk = max(1, _SCORES_AT_ONCE // len(self.keys))
        for start in range(0, len(queries), chunk):
            yield from queries[start : start + chunk] @ self.embeddings.T

    def save(self, path: Path) -> None:
        """Write the index as an npz file, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        meta = {"keys": self.keys, "space": self.space}
        write_npz(path, _KIND, meta, {"embeddings": self.embeddings})

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read an index.

        Raises:
            InputError: missing or damaged file, or not an index.
        """
        meta, arrays = read_npz(
            path, _KIND, frozenset({"keys", "space"}), frozenset({"embeddings"})
        )
        try:
            return cls(text_tuple(meta["keys"]), arrays["embeddings"], meta["space"])
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def check_space(self, space: str) -> None:
        """Refuse to be used with an encoder of another embedding space.

        Raises:
            SpaceMismatchError: the fingerprints differ.
        """
        check_space(space, self.space, "the index")


def _best(scores: NDArray[np.float32], top: int) -> NDArray[np.intp]:
    """Return the rows of the `top` highest scores, best first, ties in order of the rows."""
    count = min(top, len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")[:count]
    best: NDArray[np.intp] = candidates[order]
    return best
