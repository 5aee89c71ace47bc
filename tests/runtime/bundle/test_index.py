"""Indexes and embeddings: exact search, checks, round trips, one BLAS thread."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.bundle import index as index_module
from edgeclip.runtime.bundle.files import write_npz
from edgeclip.runtime.bundle.index import Hit, Index, LabelSet
from edgeclip.runtime.errors import InputError, SpaceMismatchError

SPACE = "ab" * 32


def unit(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result.astype(np.float32)


def make(embeddings: np.ndarray) -> Index:
    return Index(tuple(f"{row}.jpg" for row in range(len(embeddings))), embeddings, SPACE)


def test_search_by_hand() -> None:
    axes = make(np.array([[1, 0], [0, 1], [-1, 0]], np.float32))
    query = np.array([[0.6, 0.8], [-1, 0]], np.float32)
    first, second = axes.search(query, top=2)
    assert [hit.key for hit in first] == ["1.jpg", "0.jpg"]
    assert [hit.score for hit in first] == pytest.approx([0.8, 0.6])
    assert second[0] == Hit("2.jpg", 1.0)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 30),
    queries=st.integers(1, 5),
    top=st.integers(1, 40),
    seed=st.integers(0, 1000),
    coarse=st.booleans(),
)
def test_search_equals_sorting_everything(
    count: int, queries: int, top: int, seed: int, coarse: bool
) -> None:
    rows, asked = unit(count, 4, seed), unit(queries, 4, seed + 1)
    if coarse:  # signed corners of a cube: exact scores and many ties
        rows, asked = np.sign(rows) / 2, np.sign(asked) / 2
    found = make(rows).search(asked, top)
    assert len(found) == queries
    for query, hits in zip(asked, found, strict=True):
        scores = (rows @ query).tolist()
        assert len(hits) == min(top, count)
        assert [hit.score for hit in hits] == pytest.approx(
            sorted(scores, reverse=True)[:top], abs=1e-6
        )
        if coarse:
            order = sorted(range(count), key=lambda row: (-scores[row], row))[:top]
            assert [hit.key for hit in hits] == [f"{row}.jpg" for row in order]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = make(unit(20, 8)), unit(9, 8, seed=3)
    whole = index.search(queries, 5)
    monkeypatch.setattr(index_module, "_SCORES_AT_ONCE", 45)  # two queries at a time
    chunked = index.search(queries, 5)
    assert [[hit.key for hit in hits] for hits in chunked] == [
        [hit.key for hit in hits] for hits in whole
    ]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "photos.npz"
    index = Index(("a/b.jpg", "ünï 🍎.png"), unit(2, 3), SPACE, "ef" * 32)
    index.save(path)
    loaded = Index.load(path)
    assert loaded.keys == index.keys
    assert loaded.embedder == "ef" * 32
    assert loaded.space == SPACE
    assert np.array_equal(loaded.embeddings, index.embeddings)


def test_what_embedded_an_older_file_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "old.npz"
    write_npz(path, "edgeclip-index-1", {"keys": ["a"], "space": SPACE}, {"embeddings": unit(1, 3)})
    assert Index.load(path).embedder == ""


def test_a_label_set_is_not_an_index(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    LabelSet(names=("a",), embeddings=unit(1, 3), space=SPACE).save(path)
    with pytest.raises(
        InputError, match="kind 'edgeclip-labels-1', and 'edgeclip-index-1' is needed"
    ):
        Index.load(path)


def test_another_space_is_refused() -> None:
    index = make(unit(2, 3))
    assert index.search(unit(1, 3), 1, space=SPACE)
    with pytest.raises(SpaceMismatchError, match="the index was made in the embedding space"):
        index.search(unit(1, 3), 1, space="cd" * 32)


@pytest.mark.parametrize(
    ("queries", "top", "message"),
    [
        (np.ones(3, np.float32), 1, r"array\[None\]"),
        (np.eye(1, 4, dtype=np.float32), 1, "4 dimensions, the index has 3"),
        (np.full((1, 3), np.nan, np.float32), 1, "NaN"),
        (np.ones((1, 3), np.float32), 1, "queries must be L2-normalised"),
        (np.eye(1, 3, dtype=np.float32), 0, "at least 1 hit"),
    ],
)
def test_bad_queries_are_refused(queries: np.ndarray, top: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(unit(2, 3)).search(queries, top)


def test_a_key_may_occur_again() -> None:
    hits = Index(("a", "b", "a"), np.eye(3, dtype=np.float32), SPACE).search(
        np.eye(3, dtype=np.float32), 1
    )
    assert [best[0].key for best in hits] == ["a", "b", "a"]


def test_bad_indexes_are_refused() -> None:
    with pytest.raises(InputError, match="at least one row"):
        Index((), np.zeros((0, 3), np.float32), SPACE)
    with pytest.raises(InputError, match="L2-normalised"):
        Index(("a",), unit(1, 3) * 3, SPACE)


_SCRIPT = """
import numpy
from threadpoolctl import threadpool_info
from edgeclip.runtime.bundle.index import limit_blas_to_one_thread

limit_blas_to_one_thread()
blas = [item for item in threadpool_info() if item["user_api"] == "blas"]
print(len(blas), {item["num_threads"] for item in blas})
"""


def test_all_of_numpys_products_have_one_thread_afterwards() -> None:
    """In a process of its own: it holds for good."""
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    count, threads = found.stdout.split(maxsplit=1)
    assert int(count) >= 1
    assert threads.strip() == "{1}"
