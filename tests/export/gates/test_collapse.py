from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import judge_collapse
from edgeclip.export.gates.judge_precisions import judge_told_apart
from edgeclip.runtime.spec import Precision, Tower

Make = Callable[..., Source]
Embeddings = dict[tuple[Tower, Precision], NDArray[np.float32]]


def rows(count: int) -> NDArray[np.float32]:
    found = np.random.default_rng(0).normal(size=(count, 16))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float32)


def test_different_embeddings_pass() -> None:
    record = judge_collapse(rows(40), range(40))
    assert record is not None
    assert (record.passed, record.value) == (True, 1.0)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("alike", [40, 20])
def test_one_embedding_for_many_inputs_misses(alike: int, noise: float) -> None:
    found = rows(40)
    found[:alike] = found[0]
    found += noise * np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    record = judge_collapse(found, range(40))
    assert record is not None
    assert not record.passed
    assert record.value == pytest.approx(1 - alike / 40)


def test_equal_inputs_have_equal_embeddings() -> None:
    found = np.repeat(rows(4), 10, axis=0)
    record = judge_collapse(found, [row // 10 for row in range(40)])
    assert record is not None
    assert record.passed


def test_one_input_is_not_judged() -> None:
    assert judge_collapse(np.repeat(rows(1), 9, axis=0), ["a"] * 9) is None


def test_what_is_not_finite_misses() -> None:
    record = judge_collapse(np.full((4, 16), np.nan, np.float32), range(4))
    assert record is not None
    assert not record.passed


def test_both_towers_are_judged(clip: DualEncoder, blobs: Make) -> None:
    test = blobs(20)
    embeddings: Embeddings = {("image", "fp32"): rows(20), ("text", "fp32"): rows(20)}
    judged, remarks = judge_told_apart(clip, test, embeddings)
    assert [(item.subject, item.record.passed) for item in judged] == [
        ("image fp32", True),
        ("text fp32", True),
    ]
    assert judged[0].record.data is not None
    assert judged[0].record.data.count == 20
    assert remarks == ()
    embeddings["text", "fp32"] = np.repeat(rows(1), 20, axis=0)
    judged, _ = judge_told_apart(clip, test, embeddings)
    assert [item.record.passed for item in judged] == [True, False]


def test_every_text_is_judged_by_its_own_embedding(clip: DualEncoder, tmp_path: Path) -> None:
    table = ["file,caption"]
    for number in range(30):
        name = f"{number:02}.png"
        Image.new("RGB", (8, 8), (8 * number, 0, 255 - 8 * number)).save(tmp_path / name)
        table += [f"{name},picture {number}"] * 2 + [f"{name},Picture  {number}"] * 3
    (tmp_path / "captions.csv").write_text("\n".join(table))
    test = FolderSource(tmp_path)
    assert len(test.captions(0)) == 5
    embeddings: Embeddings = {
        ("image", "fp32"): rows(30),
        ("text", "fp32"): np.repeat(rows(30), 5, axis=0),
    }
    judged, _ = judge_told_apart(clip, test, embeddings)
    assert [item.record.value for item in judged] == [1.0, 1.0]


def test_a_single_pair_gives_remarks(clip: DualEncoder, blobs: Make) -> None:
    embeddings: Embeddings = {("image", "fp32"): rows(1), ("text", "fp32"): rows(1)}
    judged, remarks = judge_told_apart(clip, blobs(1), embeddings)
    assert judged == ()
    assert [item.subject for item in remarks] == ["image fp32", "text fp32"]
