"""Approximate search in a large index: a graph of neighbours by usearch, its recall measured.

Source: Malkov and Yashunin 2016, "Efficient and robust approximate nearest neighbor search
using Hierarchical Navigable Small World graphs". Candidates are scored again with the exact
embeddings, so that only which entries are found is approximate, and not their scores.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import usearch.index
from numpy.typing import NDArray

from edgeclip.runtime.files import atomic_file
from edgeclip.runtime.index import Hit, Index

if TYPE_CHECKING:
    from usearch.index import BatchMatches

_SETTINGS: dict[str, Any] = {
    "metric": "ip",
    "dtype": "f16",
    "connectivity": 16,
    "expansion_add": 128,
    "expansion_search": 128,
}
_QUERIES = 200
_TOP = 10
_NOISE = 0.3  # length of what is added to an entry to make a query of it


class ApproximateIndex:
    """An index and its graph of neighbours.

    The graph is built (about 20 s for 100,000 entries on two cores), or read from `folder`
    where it was built before from the same embeddings.

    Args:
        index: the entries.
        folder: where graphs are kept.

    Attributes:
        recall: share of the exact best 10 that are found, mean over 200 queries, which are
            entries with noise.

    Raises:
        OSError: the graph cannot be written.
    """

    def __init__(self, index: Index, folder: Path) -> None:
        self._index = index
        self._graph = self._open(folder / f"{_key(index)}.usearch")
        self.recall = self._measure()

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[tuple[Hit, ...], ...]:
        """As `Index.search`, with hits that may miss some of the best.

        Args:
            queries: float32 [Q, dim], L2-normalised.
            top: how many hits, at most as many as there are entries.
        """
        found = cast("BatchMatches", self._graph.search(queries, top, threads=1))
        if (np.asarray(found.counts) < top).any():  # a graph that does not hang together
            return self._index.search(queries, top)
        return tuple(map(self._hits, queries, np.asarray(found.keys).astype(np.intp)))

    def _hits(self, query: NDArray[np.float32], rows: NDArray[np.intp]) -> tuple[Hit, ...]:
        scores = self._index.embeddings[rows] @ query
        order = np.argsort(-scores, kind="stable")
        return tuple(Hit(self._index.keys[rows[i]], float(scores[i])) for i in order)

    def _open(self, path: Path) -> usearch.index.Index:
        embeddings = self._index.embeddings
        graph = usearch.index.Index(ndim=embeddings.shape[1], **_SETTINGS)
        if path.is_file():
            graph.load(path)
            return graph
        graph.add(np.arange(len(embeddings)), embeddings)
        with atomic_file(path) as temporary:
            graph.save(temporary)
        return graph

    def _measure(self) -> float:
        entries = self._index.embeddings
        random = np.random.default_rng(0)
        rows = random.choice(len(entries), min(_QUERIES, len(entries)), replace=False)
        noise = random.normal(size=(len(rows), entries.shape[1]))
        noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
        queries = (entries[rows] + noise).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        top = min(_TOP, len(entries))
        exact, found = self._index.search(queries, top), self.search(queries, top)
        shares = [
            len({hit.key for hit in best} & {hit.key for hit in hits}) / top
            for best, hits in zip(exact, found, strict=True)
        ]
        return float(np.mean(shares))


def _key(index: Index) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(index.embeddings).data)
    digest.update(repr((usearch.__version__, index.embeddings.shape, _SETTINGS)).encode())
    return digest.hexdigest()[:32]
