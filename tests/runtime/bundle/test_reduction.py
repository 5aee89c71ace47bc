"""Reduced embeddings and their index: exactness, error bounds, round trips, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.bundle.reduced_index import ReducedIndex, count_bits, load_index
from edgeclip.runtime.bundle.reduction import (
    ROW_TYPES,
    Basis,
    Form,
    Reducer,
    RowType,
    check_lengths,
    make_basis,
)
from edgeclip.runtime.errors import ConfigError, InputError, SpaceMismatchError

few = settings(max_examples=25)
SPACE, DIM = "5" * 64, 24


def unit(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(seed).normal(size=(count, dim)) * np.linspace(2, 0.1, dim)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def basis(*lengths: int, seed: int = 0) -> Basis:
    rows = unit(200, seed=99 + seed).astype(np.float64)
    return make_basis(rows.T @ rows, SPACE, lengths or (12, 5))


def reduced(form: Form, count: int = 30, seed: int = 0) -> ReducedIndex:
    keys = tuple(f"{row}.jpg" for row in range(count))
    return ReducedIndex.of(Index(keys, unit(count, seed), SPACE), basis().reducer(form))


def test_a_basis_by_hand() -> None:
    # Rows along (3, 4) / 5 hold most, (4, -3) / 5 a little: these are the axes, each with its
    # largest value positive.
    rows = np.array([[0.6, 0.8]] * 3 + [[0.8, -0.6]])
    found = make_basis(rows.T @ rows, SPACE, (1,))
    assert np.allclose(found.axes, [[0.6, 0.8], [0.8, -0.6]])
    assert found.lengths == (2, 1)
    assert [str(form) for form in found.forms] == [
        "2 int8",
        "2 binary",
        "1 float32",
        "1 int8",
        "1 binary",
    ]
    one = found.reducer(Form(1, "float32"))
    assert np.allclose(one.reduce(np.array([[1.0, 0], [0, -1]], np.float32)), [[1], [-1]])
    with pytest.raises(InputError, match="nothing in the first 1 dim"):
        one.reduce(np.array([[0.8, -0.6]], np.float32))


def test_turned_axes_do_not_hang_on_the_processor() -> None:
    # Products in float32 differ in their last bit between kernels of BLAS, and so did the digest.
    found = basis(12)
    turned = found.reducer(Form(12, "binary")).axes
    exact = [
        [
            np.float32(sum(float(a) * float(b) for a, b in zip(row, axis, strict=True)))
            for axis in found.axes[:12].T
        ]
        for row in found.turns[found.lengths.index(12)]
    ]
    assert np.array_equal(turned, exact)


def test_the_whole_turned_space_has_the_same_cosines() -> None:
    whole = basis().reducer(Form(DIM, "float32"))
    first, second = unit(20), unit(10, seed=1)
    assert np.allclose(whole.reduce(first) @ whole.reduce(second).T, first @ second.T, atol=1e-5)


@few
@given(seed=st.integers(0, 999))
def test_a_turned_space_is_reduced_to_the_same(seed: int) -> None:
    # A basis of rotated embeddings undoes the rotation, up to the signs of its axes.
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, DIM)))[0]
    rows = unit(200, seed=99).astype(np.float64)
    ours, turned = basis(), make_basis((rows @ turn).T @ (rows @ turn), SPACE, (12, 5))
    some = unit(8, seed)
    moved = (some @ turn).astype(np.float32)
    form = Form(5, "float32")
    first, second = ours.reducer(form).reduce(some), turned.reducer(form).reduce(moved)
    assert np.allclose(first @ first.T, second @ second.T, atol=1e-4)


@few
@given(length=st.sampled_from((DIM, 12, 5)), seed=st.integers(0, 999))
def test_int8_is_off_by_half_a_step(length: int, seed: int) -> None:
    reducer = basis().reducer(Form(length, "int8"))
    some = unit(10, seed)
    cut, rows = reducer.reduce(some), reducer.rows(some)
    step = np.abs(cut).max(axis=1, keepdims=True) / 127
    assert np.abs(rows * step - cut).max() <= step.max() / 2 + 1e-6
    # Half a step in each value, and as much again for the length, which is made 1 anew.
    assert (np.linalg.norm(reducer.restore(rows) - cut, axis=1) <= step[:, 0] * length**0.5).all()


def test_binary_rows_by_hand() -> None:
    plain = Reducer(Form(3, "binary"), np.eye(3, 4, dtype=np.float32), SPACE)
    rows = plain.rows(np.array([[0.6, -0.8, 0, 0], [-0.6, 0.48, 0.64, 0]], np.float32))
    assert rows.tolist() == [[0b10000000], [0b01100000]]
    third = 1 / np.sqrt(3)
    assert np.allclose(plain.restore(rows), [[third, -third, -third], [-third, third, third]])


@few
@given(
    length=st.sampled_from((DIM, 12, 5)),
    dtype=st.sampled_from(ROW_TYPES),
    count=st.integers(1, 40),
    top=st.integers(1, 50),
    seed=st.integers(0, 999),
)
def test_search_equals_sorting_what_the_rows_stand_for(
    length: int, dtype: RowType, count: int, top: int, seed: int
) -> None:
    index, queries = reduced(Form(length, dtype), count, seed), unit(3, seed + 1)
    wanted = index.reducer.reduce(queries) @ index.reducer.restore(index.rows).T
    for scores, hits in zip(wanted, index.search(queries, top, rerank=count), strict=True):
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores)[::-1][:top], abs=1e-5)
        assert len({hit.key for hit in hits}) == min(top, count)
    bases = index.reducer.digest
    assert index.search(index.reducer.reduce(queries), top, basis=bases) == index.search(
        queries, top
    )


@few
@given(seed=st.integers(0, 99), rerank=st.integers(1, 29))
def test_the_nearest_signs_are_scored_again(seed: int, rerank: int) -> None:
    index, query = reduced(Form(DIM, "binary"), 30, seed), unit(1, seed + 1)
    (found,) = index.search(query, 1, rerank=rerank)
    signs, rows = (np.unpackbits(own, axis=1) for own in (index.reducer.rows(query), index.rows))
    near = np.argsort((signs != rows).sum(axis=1), kind="stable")[:rerank]
    scores = index.reducer.restore(index.rows) @ index.reducer.reduce(query)[0]
    assert found[0].key == f"{near[scores[near].argmax()]}.jpg"


def test_older_numpy_counts_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (5, 3), np.uint64)
    wanted = [[int(word).bit_count() for word in row] for row in words]
    assert count_bits(words).tolist() == wanted
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert count_bits(words).tolist() == wanted


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_round_trips(tmp_path: Path, dtype: RowType) -> None:
    ours = basis()
    ours.save(tmp_path / "basis.npz")
    read = Basis.load(tmp_path / "basis.npz")
    assert read.lengths == (DIM, 12, 5)
    index = reduced(Form(5, dtype))
    assert read.reducer(Form(5, dtype)).digest == index.reducer.digest
    index.save(tmp_path / "index.npz")
    loaded = load_index(tmp_path / "index.npz")
    assert isinstance(loaded, ReducedIndex)
    assert loaded.keys == index.keys
    assert np.array_equal(loaded.rows, index.rows)
    assert loaded.search(unit(2), 3, space=SPACE) == index.search(unit(2), 3)


def test_an_index_of_full_embeddings_is_still_one(tmp_path: Path) -> None:
    Index(("a",), unit(1), SPACE).save(tmp_path / "index.npz")
    assert isinstance(load_index(tmp_path / "index.npz"), Index)
    (tmp_path / "index.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        load_index(tmp_path / "index.npz")


def test_others_queries_are_refused() -> None:
    index = reduced(Form(5, "binary"))
    with pytest.raises(SpaceMismatchError, match="space"):
        index.search(unit(1), space="6" * 64)
    with pytest.raises(SpaceMismatchError, match="reduced by"):
        index.search(unit(1, dim=5), basis=basis(seed=1).reducer(Form(5, "binary")).digest)
    with pytest.raises(InputError, match="full embeddings"):
        index.search(unit(1, dim=5))
    with pytest.raises(InputError, match="have 24 dimensions, the index has 5"):
        index.search(unit(1), basis=index.reducer.digest)
    with pytest.raises(InputError, match="NaN"):
        index.search(np.full((1, DIM), np.nan, np.float32))
    with pytest.raises(SpaceMismatchError):
        ReducedIndex.of(Index(("a",), unit(1), "6" * 64), index.reducer)


@pytest.mark.parametrize("lengths", [(), (0,), (5, DIM + 1), (5, 5)])
def test_lengths_that_cannot_be(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        check_lengths(lengths, DIM)


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_an_index_of_nothing_is_refused(dtype: RowType) -> None:
    form = Form(12, dtype)
    shape, kind = form.row
    with pytest.raises(InputError):
        ReducedIndex((), np.empty((0, *shape), kind), basis().reducer(form))


def test_lengths_that_were_not_prepared() -> None:
    with pytest.raises(InputError, match="choose from 24, 12, 5"):
        basis().reducer(Form(8, "int8"))


@pytest.mark.parametrize(
    ("dtype", "damage"),
    [
        ("float32", {"rows": unit(30, dim=5) * 2}),
        ("float32", {"rows": np.full((30, 5), np.nan, np.float32)}),
        ("int8", {"rows": np.zeros((30, 5), np.int8)}),
        ("int8", {"rows": np.full((30, 5), -128, np.int8)}),
        ("binary", {"rows": np.full((30, 1), 255, np.uint8)}),
        ("binary", {"rows": np.zeros((30, 2), np.uint8)}),
        ("binary", {"axes": np.eye(5, DIM, dtype=np.float32)}),
        ("binary", {"axes": np.ones((5, DIM), np.float32)}),
        ("binary", {"length": 6}),
        ("binary", {"length": -1}),
        ("binary", {"dtype": "int4"}),
        ("binary", {"dtype": "int8"}),
        ("binary", {"space": "6" * 64}),
        ("binary", {"keys": ["a"]}),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, dtype: RowType, damage: dict[str, Any]) -> None:
    path = tmp_path / "index.npz"
    reduced(Form(5, dtype)).save(path)
    kind = "edgeclip-reduced-index-1"
    names = frozenset({"keys", "space", "embedder", "length", "dtype", "basis"})
    meta, arrays = read_npz(path, kind, names, frozenset({"rows", "axes"}))
    for name, value in damage.items():
        (arrays if name in arrays else meta)[name] = value
    write_npz(path, kind, meta, arrays)
    with pytest.raises(InputError, match="damaged"):
        load_index(path)


def test_a_damaged_basis_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "basis.npz"
    good = basis()
    turns = np.concatenate([turn.ravel() for turn in good.turns])
    for lengths, axes, own in (
        ([DIM, 12], good.axes, turns),
        ([DIM, 12, 5], good.axes[:5], turns),
        ([DIM, 12, 5], good.axes * 2, turns),
        ([DIM, 12, 5], good.axes, turns * np.float32(np.nan)),
        ("all", good.axes, turns),
    ):
        meta = {"space": SPACE, "lengths": lengths}
        write_npz(path, "edgeclip-basis-1", meta, {"axes": axes, "turns": own})
        with pytest.raises(InputError, match="damaged"):
            Basis.load(path)
