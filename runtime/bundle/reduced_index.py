"""An index of reduced embeddings: a fraction of the bytes, searched by full ones.

It holds the axes that its rows were reduced by, so any encoder of the space can search it: an index
that a server's teacher made is searched by the student on a device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import npz_kind, read_npz, write_npz
from edgeclip.runtime.bundle.index import (
    Hit,
    Index,
    best_rows,
    check_keys,
    check_space,
    check_unit_rows,
    text_tuple,
)
from edgeclip.runtime.bundle.reduction import Form, Reducer
from edgeclip.runtime.errors import InputError, SpaceMismatchError

_KIND = "edgeclip-reduced-index-1"
_META = frozenset({"keys", "space", "embedder", "length", "dtype", "basis"})
_VALUES_AT_ONCE = 1 << 22  # 16 MiB of float32 rows, or twice that of packed ones
_BEST = 200  # rows that are scored again at least, and so many times `top`:
_TIMES_TOP = 10


@dataclass(frozen=True, slots=True, eq=False)
class ReducedIndex:
    """Keys with one row each of reduced embeddings; a key may occur again.

    `rows` are those of `reducer.rows`, made of embeddings by the tower that `embedder` names (see
    `embedder_of`; "" if unknown).
    """

    keys: tuple[str, ...]
    rows: NDArray[Any]
    reducer: Reducer
    embedder: str = ""

    def __post_init__(self) -> None:
        """Check keys and rows.

        Raises:
            InputError: empty keys, or rows that do not fit them or the form.
        """
        check_keys("index", self.keys, self.space, unique=False)
        self.reducer.check_rows(self.rows, len(self.keys))

    @classmethod
    def of(cls, index: Index, reducer: Reducer) -> "ReducedIndex":
        """Reduce an index of full embeddings.

        Raises:
            SpaceMismatchError: the axes are those of another embedding space.
            InputError: embeddings of another length, or one of which nothing is left.
        """
        index.check_space(reducer.space)
        return cls(index.keys, reducer.rows(index.embeddings), reducer, index.embedder)

    @property
    def space(self) -> str:
        """Fingerprint of the embedding space."""
        return self.reducer.space

    def search(
        self,
        queries: NDArray[Any],
        top: int = 10,
        *,
        space: str | None = None,
        basis: str | None = None,
        rerank: int | None = None,
    ) -> tuple[tuple[Hit, ...], ...]:
        """Find the `top` keys of highest cosine for each query, best first.

        The cosine is that of the reduced query, in float32, with what a row stands for. A binary
        index is searched in two steps: the `rerank` rows whose signs differ least from those of the
        query (Hamming distance) are scored. Equal scores keep the order of the index.

        Args:
            queries: full embeddings [Q, dim]; or reduced ones [Q, length], with `basis`.
            top: how many hits to return, at least 1.
            space: fingerprint of the queries' embedding space, if it is known.
            basis: `Reducer.digest` of what reduced the queries.
            rerank: rows that are scored; by default 10 times `top`, and at least 200. Of other
                than binary rows all are.

        Raises:
            SpaceMismatchError: `space` or `basis` is not the index's.
            InputError: another shape, NaN, rows not L2-normalised, or `top` or `rerank` below 1.
        """
        if space is not None:
            self.check_space(space)
        if top < 1 or (rerank is not None and rerank < 1):
            raise InputError(f"top is {top}, rerank {rerank}: ask for at least 1 hit")
        reduced = self._reduced(queries, basis)
        count = len(self.keys)
        if self.reducer.form.dtype == "binary":
            chosen = max(top, max(_BEST, _TIMES_TOP * top) if rerank is None else rerank)
            if chosen < count:
                return tuple(self._search_signs(query, top, chosen) for query in reduced)
        scores = self._scores(reduced)
        return tuple(self._hits(own, np.arange(count), top) for own in scores)

    def _reduced(self, queries: NDArray[Any], basis: str | None) -> FloatArray:
        if basis is None:
            return self.reducer.reduce(queries)
        if basis != self.reducer.digest:
            raise SpaceMismatchError(
                f"the queries were reduced by {basis[:12]}, the index by "
                f"{self.reducer.digest[:12]}: send full embeddings, which it reduces itself"
            )
        check_unit_rows(queries, "queries")
        if queries.shape[1] != self.reducer.form.length:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions, the index has {self.reducer.form}"
            )
        return queries.astype(np.float32, copy=False)

    def _scores(self, queries: FloatArray) -> Iterator[FloatArray]:
        """Yield the scores [N] of each query; rows are restored a block at a time."""
        at_once = max(1, 4 * _VALUES_AT_ONCE // len(self.keys))
        for first in range(0, len(queries), at_once):
            part = queries[first : first + at_once]
            scores = np.empty((len(part), len(self.keys)), np.float32)
            for block in self._blocks(self.reducer.form.length):
                scores[:, block] = part @ self.reducer.restore(self.rows[block]).T
            yield from scores

    def _blocks(self, values: int) -> Iterator[slice]:
        size = max(1, _VALUES_AT_ONCE // values)
        return (slice(first, first + size) for first in range(0, len(self.keys), size))

    def _search_signs(self, query: FloatArray, top: int, chosen: int) -> tuple[Hit, ...]:
        signs, rows = _words(np.packbits(query > 0)[None]), _words(self.rows)
        apart = np.empty(len(rows), np.uint16)
        for block in self._blocks(rows.shape[1]):
            apart[block] = count_bits(rows[block] ^ signs).sum(axis=1, dtype=np.uint16)
        # Rows that are equally near are taken in their order, up to the number asked for.
        limit = np.partition(apart, chosen - 1)[chosen - 1]
        nearer, level = np.flatnonzero(apart < limit), np.flatnonzero(apart == limit)
        found = np.sort(np.concatenate([nearer, level[: chosen - len(nearer)]]))
        return self._hits(self.reducer.restore(self.rows[found]) @ query, found, top)

    def _hits(self, scores: FloatArray, rows: NDArray[np.intp], top: int) -> tuple[Hit, ...]:
        return tuple(
            Hit(self.keys[rows[place]], float(scores[place])) for place in best_rows(scores, top)
        )

    def save(self, path: Path) -> None:
        """Write the index to an npz file, atomically, its axes included.

        Raises:
            InputError: the file cannot be written.
        """
        form = self.reducer.form
        meta = {
            "keys": self.keys,
            "space": self.space,
            "embedder": self.embedder,
            "length": form.length,
            "dtype": form.dtype,
            "basis": self.reducer.digest,
        }
        write_npz(path, _KIND, meta, {"rows": self.rows, "axes": self.reducer.axes})

    @classmethod
    def load(cls, path: Path) -> "ReducedIndex":
        """Read an index from an npz file.

        Raises:
            InputError: missing or damaged file, or no index of reduced embeddings.
        """
        meta, arrays = read_npz(path, _KIND, _META, frozenset({"rows", "axes"}))
        try:
            if type(meta["length"]) is not int or not isinstance(meta["embedder"], str):
                raise InputError("its length is no number, or its embedder no text")
            form = Form(meta["length"], meta["dtype"])
            reducer = Reducer(form, arrays["axes"], meta["space"])
            if reducer.digest != meta["basis"]:
                raise InputError("its axes are not those that it was made with")
            return cls(text_tuple(meta["keys"]), arrays["rows"], reducer, meta["embedder"])
        except (InputError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def check_space(self, space: str) -> None:
        """Check that the index belongs to an encoder's embedding space.

        Raises:
            SpaceMismatchError: the fingerprints differ.
        """
        check_space(space, self.space, "the index")


AnyIndex = Index | ReducedIndex


def load_index(path: Path) -> AnyIndex:
    """Read an index of full or of reduced embeddings.

    Raises:
        InputError: missing or damaged file, or no index.
    """
    return ReducedIndex.load(path) if npz_kind(path) == _KIND else Index.load(path)


def _words(rows: NDArray[np.uint8]) -> NDArray[Any]:
    """View packed rows as the longest words that divide them."""
    size = next(size for size in (8, 4, 2, 1) if rows.shape[1] % size == 0)
    return np.ascontiguousarray(rows).view(f"u{size}")


def count_bits(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Count the ones of each word of 1 to 8 bytes; NumPy has a function for it from 2.0 on."""
    if hasattr(np, "bitwise_count"):
        found: NDArray[np.uint8] = np.bitwise_count(words)
        return found
    ones = np.unpackbits(words.view(np.uint8), axis=-1)
    counts: NDArray[np.uint8] = ones.reshape(*words.shape, -1).sum(axis=-1, dtype=np.uint8)
    return counts
