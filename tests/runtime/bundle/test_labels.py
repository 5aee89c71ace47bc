from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.bundle.files import write_npz
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.errors import InputError, SpaceMismatchError

SPACE = "ab" * 32


def unit(count: int, dim: int = 4) -> np.ndarray:
    rows = np.random.default_rng(count).normal(size=(count, dim))
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result.astype(np.float32)


def label_set(**changes: Any) -> LabelSet:
    fields: dict[str, Any] = {
        "names": ("red apple", "hot beverage", "größe\0"),
        "embeddings": unit(3),
        "space": SPACE,
        "templates": ("a photo of a {}", "{}"),
    }
    return LabelSet(**{**fields, **changes})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "fruit.npz"
    labels = label_set(embedder="ef" * 32)
    labels.save(path)
    loaded = LabelSet.load(path)
    assert loaded.names == labels.names
    assert loaded.embedder == "ef" * 32
    assert loaded.digest == labels.digest
    assert loaded.templates == labels.templates
    assert loaded.space == SPACE
    assert loaded.embeddings.dtype == np.float32
    assert np.array_equal(loaded.embeddings, labels.embeddings)


def test_the_digest_is_that_of_names_and_embeddings() -> None:
    digest = label_set().digest
    assert label_set(templates=("{}",), embedder="x").digest == digest
    for change in (
        {"names": ("red apple", "hot beverage", "größe")},
        {"names": ("red apple\0hot beverage", "größe", "")[:2], "embeddings": unit(2)},
        {"embeddings": unit(3)[::-1].copy()},
    ):
        assert label_set(**change).digest != digest


def test_what_embedded_an_older_file_is_unknown(tmp_path: Path) -> None:
    meta = {"names": ["a"], "space": SPACE, "templates": ["{}"]}
    write_npz(tmp_path / "old.npz", "edgeclip-labels-1", meta, {"embeddings": unit(1)})
    assert LabelSet.load(tmp_path / "old.npz").embedder == ""
    meta["embedder"] = 3  # type: ignore[assignment]
    write_npz(tmp_path / "bad.npz", "edgeclip-labels-1", meta, {"embeddings": unit(1)})
    with pytest.raises(InputError, match="the embedder in"):
        LabelSet.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a", "b")}, "2 label names cannot name 3"),
        ({"names": ("a", "b", "a")}, "'a' occurs twice"),
        ({"names": ("a", "b", "")}, "non-empty"),
        ({"names": ("a", "b", 3)}, "must be a non-empty text"),
        ({"space": ""}, "fingerprint"),
        ({"embeddings": unit(3) * 2}, "row 0 has length 2"),
        ({"embeddings": unit(3).astype(np.float64)}, "float32, not float64"),
        ({"embeddings": unit(3)[0]}, r"shape \[N, dim\]"),
        ({"embeddings": unit(3) * np.float32(np.nan)}, "NaN"),
        ({"embeddings": np.ones((3, 4), np.int32)}, "floats"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_set(**changes)


def test_half_precision_rounding_is_accepted() -> None:
    rounded = unit(3, 512).astype(np.float16).astype(np.float32)
    assert label_set(embeddings=rounded).embeddings is rounded


def test_a_damaged_label_set_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    meta = {"names": ["a"], "templates": "x", "space": SPACE}
    write_npz(path, "edgeclip-labels-1", meta, {"embeddings": unit(1)})
    with pytest.raises(InputError, match=r"bad\.npz is damaged: a list of texts"):
        LabelSet.load(path)
    meta = {"names": ["a", "b"], "templates": [], "space": SPACE}
    write_npz(path, "edgeclip-labels-1", meta, {"embeddings": unit(1)})
    with pytest.raises(InputError, match=r"bad\.npz is damaged: 2 label names"):
        LabelSet.load(path)


def test_another_space_is_refused() -> None:
    labels = label_set()
    labels.check_space(SPACE)
    with pytest.raises(SpaceMismatchError, match="label set was made in the embedding space ab"):
        labels.check_space("cd" * 32)
