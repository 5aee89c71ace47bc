"""Search in an index as a model of the server: exact, or approximate for a large index.

Approximate search uses an HNSW graph (usearch): Malkov and Yashunin 2016, "Efficient and robust
approximate nearest neighbor search using Hierarchical Navigable Small World graphs". Candidates
are scored again with the exact embeddings: which entries are found is approximate, their scores
are not.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.bundle.index import Hit, Index, check_embeddings
from edgeclip.runtime.bundle.reduced_index import AnyIndex, ReducedIndex
from edgeclip.runtime.engines.onnxruntime_engine import import_onnxruntime
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.serving.models import TensorSpec, take_top
from edgeclip.runtime.wire.messages import BASIS, Parameter
from edgeclip.runtime.wire.tensors import BYTES

_SETTINGS: dict[str, Any] = {
    "metric": "ip",
    "dtype": "f16",
    "connectivity": 16,
    "expansion_add": 128,
    "expansion_search": 128,
}
_QUERIES = 200
_MEASURED_TOP = 10
_NOISE = 0.3  # length of the noise that is added to an entry to make a query


class ApproximateIndex:
    """An index with an HNSW graph for approximate search.

    The graph is built (about 20 s for 100,000 entries on two cores), or read from `folder` if
    it was built before from the same embeddings.

    Args:
        index: the entries.
        folder: cache of graphs.

    Attributes:
        recall: share of the exact best 10 that are found; mean over 200 queries, which are
            entries with noise.

    Raises:
        OSError: the graph cannot be written.
    """

    def __init__(self, index: Index, folder: Path) -> None:
        self._index = index
        self._graph = self._open(folder / f"{_key(index)}.usearch")
        self.recall = self._measure()

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[tuple[Hit, ...], ...]:
        """Return hits as `Index.search` does, perhaps without some of the best.

        Args:
            queries: float32 [Q, dim], L2-normalised.
            top: number of hits, at most the number of entries.
        """
        found = self._graph.search(queries, top, threads=1)
        # For a single query usearch returns one row of the keys that it found, without counts.
        keys = np.atleast_2d(np.asarray(found.keys)).astype(np.intp)
        counts = [keys.shape[1]] if len(queries) == 1 else np.asarray(found.counts)
        if min(counts) < top:  # a graph that is not connected
            return self._index.search(queries, top)
        return tuple(map(self._hits, queries, keys))

    def _hits(self, query: NDArray[np.float32], rows: NDArray[np.intp]) -> tuple[Hit, ...]:
        scores = self._index.embeddings[rows] @ query
        order = np.argsort(-scores, kind="stable")
        return tuple(Hit(self._index.keys[rows[i]], float(scores[i])) for i in order)

    def _open(self, path: Path) -> Any:
        usearch = _import_usearch()

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
        top = min(_MEASURED_TOP, len(entries))
        exact, found = self._index.search(queries, top), self.search(queries, top)
        shares = [
            len({hit.key for hit in best} & {hit.key for hit in hits}) / top
            for best, hits in zip(exact, found, strict=True)
        ]
        return float(np.mean(shares))


def _import_usearch() -> Any:
    """Import usearch after ONNX Runtime, which crashes if usearch was imported first."""
    with contextlib.suppress(MissingExtraError):
        import_onnxruntime()
    import usearch.index

    return usearch


def _key(index: Index) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(index.embeddings).data)
    digest.update(repr((_import_usearch().__version__, index.embeddings.shape, _SETTINGS)).encode())
    return digest.hexdigest()[:32]


EXACT_UP_TO = 200_000  # entries; a query of 512 dimensions then reads 400 MB
_DEFAULT_TOP = 10
_Search = Callable[[NDArray[np.float32], int], tuple[tuple[Hit, ...], ...]]


class SearchModel:
    """Nearest entries to `embeddings` FP32 [N, dim]: `key` BYTES and `score` FP32, both [N, top].

    The best come first. Parameter `top`, by default 10, at most all entries.

    An index of reduced embeddings takes full ones, FP32 [N, dim], and reduces them; or reduced
    ones, FP32 [N, length], with the parameter `basis`, `Reducer.digest`.

    Args:
        index: the entries.
        name: name of the model.
        folder: cache of the graphs of large indexes.
        exact_up_to: entries of the largest index that is searched exactly.

    Attributes:
        description: number of entries and exactness of the search, in one line.

    Raises:
        OSError: see `ApproximateIndex`.
    """

    outputs = (
        TensorSpec(name="key", datatype=BYTES, shape=(-1, -1)),
        TensorSpec(name="score", datatype="FP32", shape=(-1, -1)),
    )

    def __init__(
        self, index: AnyIndex, name: str, folder: Path, *, exact_up_to: int = EXACT_UP_TO
    ) -> None:
        count = len(index.keys)
        self._reduced = index if isinstance(index, ReducedIndex) else None
        self._dim = (
            index.reducer.dim if isinstance(index, ReducedIndex) else index.embeddings.shape[1]
        )
        self.name = name
        self.space: str | None = index.space
        width = self._dim if self._reduced is None else -1
        self.inputs = (TensorSpec(name="embeddings", datatype="FP32", shape=(-1, width)),)
        self._count = count
        self._search: _Search = index.search
        how = "exact search"
        if isinstance(index, ReducedIndex):
            form = index.reducer.form
            how = f"embeddings of {form.length} numbers as {form.dtype}, {how}"
            if form.dtype == "binary":
                how += " of the nearest by their signs"
        elif count > exact_up_to:
            approximate = ApproximateIndex(index, folder)
            self._search = approximate.search
            found = f"{approximate.recall:.1%} of the best 10 for entries with noise"
            how = f"approximate search, which finds {found}"
        self.description = f"{name}: {count:,} entries, {how}"

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Return the nearest entries of each query."""
        queries = inputs["embeddings"]
        top = take_top(parameters, _DEFAULT_TOP, self._count)
        basis = parameters.get(BASIS)
        if basis is not None and self._reduced is None:
            raise InputError(f"{self.name} holds full embeddings: send full ones, without {BASIS}")
        if self._reduced is not None and basis is not None:
            rows = self._reduced.search(queries, top, basis=str(basis))
        else:
            check_embeddings(queries, self._dim, "embeddings")
            rows = self._search(queries, top)
        # A file's name that is not UTF-8 goes as the bytes that it has on the disk.
        keys = [[hit.key.encode("utf-8", "surrogateescape") for hit in row] for row in rows]
        scores = [[hit.score for hit in row] for row in rows]
        return {"key": np.array(keys, object), "score": np.array(scores, np.float32)}
