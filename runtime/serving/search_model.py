"""Search in an index as a model of the server."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.embeddings import check_embeddings
from edgeclip.runtime.index import Hit, Index
from edgeclip.runtime.serving.models import Arrays, TensorSpec, take_top
from edgeclip.runtime.wire.messages import Parameter
from edgeclip.runtime.wire.tensors import BYTES

EXACT_UP_TO = 200_000  # entries; a query of 512 dimensions reads 400 MB then
_TOP = 10
_Search = Callable[[NDArray[np.float32], int], tuple[tuple[Hit, ...], ...]]


class SearchModel:
    """Nearest entries to `embeddings` FP32 [N, dim]: `key` BYTES and `score` FP32, both [N, top].

    The best come first. Parameter `top`, by default 10, at most all entries.

    Args:
        index: what is searched.
        name: of the model.
        folder: where the graphs of large indexes are kept.
        exact_up_to: entries of the largest index that is searched exactly.

    Attributes:
        about: one line for a person: how many entries, and how exact the search is.

    Raises:
        OSError: see `ApproximateIndex`.
    """

    outputs = (
        TensorSpec(name="key", datatype=BYTES, shape=(-1, -1)),
        TensorSpec(name="score", datatype="FP32", shape=(-1, -1)),
    )

    def __init__(
        self, index: Index, name: str, folder: Path, *, exact_up_to: int = EXACT_UP_TO
    ) -> None:
        count, self._dim = index.embeddings.shape
        self.name = name
        self.space: str | None = index.space
        self.inputs = (TensorSpec(name="embeddings", datatype="FP32", shape=(-1, self._dim)),)
        self._count = count
        is_exact = count <= exact_up_to
        self._search, how = _exact(index) if is_exact else _approximate(index, folder)
        self.about = f"{name}: {count:,} entries, {how}"

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Search; see `Index.search`."""
        queries = inputs["embeddings"]
        check_embeddings(queries, self._dim, "embeddings")
        rows = self._search(queries, take_top(parameters, _TOP, self._count))
        keys = [[hit.key.encode() for hit in row] for row in rows]
        scores = [[hit.score for hit in row] for row in rows]
        return {"key": np.array(keys, object), "score": np.array(scores, np.float32)}


def _exact(index: Index) -> tuple[_Search, str]:
    return index.search, "exact search"


def _approximate(index: Index, folder: Path) -> tuple[_Search, str]:
    from edgeclip.runtime.serving.approximate_index import ApproximateIndex

    approximate = ApproximateIndex(index, folder)
    found = f"{approximate.recall:.1%} of the best 10 for entries with noise"
    return approximate.search, f"approximate search, which finds {found}"
