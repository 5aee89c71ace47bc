from pathlib import Path

import numpy as np
import pytest

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.zero_shot import bake_labels_with_teacher, read_label_names
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.runtime.errors import InputError


def test_a_label_is_the_mean_of_the_teachers_texts(clip: DualEncoder) -> None:
    templates = ("a {}", "{} picture")
    names = tuple(f"label {number}" for number in range(40))  # more texts than go in one batch
    labels = bake_labels_with_teacher(clip, names, templates)
    assert (labels.names, labels.templates, labels.space) == (names, templates, clip.space)
    texts = ["a label 39", "label 39 picture"]
    mean = torch_embedder(clip, "text")(clip.text_tokenizer.encode(texts)).mean(axis=0)
    np.testing.assert_allclose(labels.embeddings[39], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_label_that_is_too_long_is_refused(clip: DualEncoder) -> None:
    with pytest.raises(InputError, match=r"too long|tokens"):
        bake_labels_with_teacher(clip, ["red " * 100])


def test_labels_come_from_a_line_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "animals.txt"
    path.write_text("cat\n\n red panda \n")
    assert read_label_names("cat, dog") == ("labels", ("cat", "dog"))
    assert read_label_names("pets=cat") == ("pets", ("cat",))
    assert read_label_names(str(path)) == ("animals", ("cat", "red panda"))
    assert read_label_names(f"mine={path}") == ("mine", ("cat", "red panda"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a/b=cat", "cannot name a label set"),
        (".hidden=cat", "cannot name a label set"),
        ("pets=cat,,dog", "empty name"),
        ("missing.txt", "cannot read the labels in missing.txt"),
    ],
)
def test_what_cannot_be_read_is_one_line(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_label_names(given)
