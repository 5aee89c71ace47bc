"""Label sets embedded by the teacher, and zero-shot accuracy on them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.compress.data.emoji_scenes import vocabulary
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.zero_shot import (
    EMOJI_TEMPLATES,
    SubsetSource,
    ZeroShotSet,
    bake_labels_with_teacher,
    emoji_zero_shot,
    find_zero_shot,
    read_label_names,
)
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.errors import InputError

Make = Callable[..., Source]


def label_set(*names: str) -> LabelSet:
    return LabelSet(
        names=names, embeddings=np.eye(len(names), 16, dtype=np.float32), space="7" * 64
    )


def folder(root: Path, **captions: str) -> FolderSource:
    """Pictures by path, with `__` for a folder's slash, and their captions."""
    for name, caption in captions.items():
        path = root / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
        path.with_suffix(".txt").write_text(caption)
    return FolderSource(root)


def found_in(source: FolderSource, labels: LabelSet) -> dict[str, str]:
    """Which label each picture has, by the names of both."""
    found = find_zero_shot(source, [labels])
    if found is None:
        return {}
    assert isinstance(found.source, SubsetSource)
    assert found.rows_of(source) == found.source.numbers
    paths = [source.paths[number].stem for number in found.source.numbers]
    return dict(zip(paths, [labels.names[place] for place in found.targets], strict=True))


def test_a_caption_that_names_one_label_is_an_answer(tmp_path: Path) -> None:
    source = folder(
        tmp_path,
        one="A Cat on a rug",
        two="a cat and a dog",
        none="a house",
        part="a catalogue",
        longer="a red apple, not just an apple",
        plural="red apple",
        odd="written in C++, see",
    )
    labels = label_set("cat", "dog", "apple", "red apple", "C++")
    assert found_in(source, labels) == {"one": "cat", "plural": "red apple", "odd": "C++"}


def test_the_name_of_a_folder_comes_before_the_caption(tmp_path: Path) -> None:
    source = folder(
        tmp_path, red_apple__a="a cat on a rug", other__b="a cat on a rug", Cat__c="nothing"
    )
    labels = label_set("cat", "red apple")
    assert found_in(source, labels) == {"a": "red apple", "b": "cat", "c": "cat"}


def test_the_label_set_that_names_most_is_taken(blobs: Make) -> None:
    test = blobs(40)
    few, many = label_set("teal", "nothing"), label_set("red", "green", "blue")
    found = find_zero_shot(test, [few, many, label_set("none at all")])
    assert found is not None
    assert found.labels is many
    for place, number in zip(found.targets, found.rows_of(test) or (), strict=True):
        assert many.names[place] in str(test.caption(number))
    assert find_zero_shot(test, [label_set("none at all")]) is None
    assert find_zero_shot(test, []) is None


def test_chosen_pairs_are_those_of_the_source(blobs: Make) -> None:
    base = blobs(10)
    chosen = SubsetSource(base, [7, 2], "two")
    assert (len(chosen), chosen.name, chosen.has_captions) == (2, "two", True)
    assert chosen.caption(0) == base.caption(7)
    assert chosen[1].image.tobytes() == base[2].image.tobytes()
    others = SubsetSource(base, [2, 7], "two"), SubsetSource(blobs(10, seed=1), [7, 2], "two")
    assert len({chosen.identity, *(item.identity for item in others)}) == 3


def test_the_built_in_scenes_are_named_by_the_teacher(clip: DualEncoder) -> None:
    found = emoji_zero_shot(clip, count=6, size=32)
    assert found.source.name == "EmojiScenes test, 6 scenes of one emoji"
    assert found.labels.templates == EMOJI_TEMPLATES
    assert found.labels.space == clip.space
    base = found.source.base  # type: ignore[attr-defined]
    assert isinstance(base, EmojiSource)
    for place, number in enumerate(found.source.numbers):  # type: ignore[attr-defined]
        (placed,) = base.scene(number).objects
        name = found.labels.names[found.targets[place]]
        assert vocabulary()[placed.emoji].name == name
        caption = str(found.source.caption(place))
        templates = [item.replace("{}", name) for item in EMOJI_TEMPLATES]
        assert any(caption.endswith(template) for template in templates)
    assert len({found.source.caption(index) for index in range(6)}) == 6
    assert found.rows_of(EmojiSource("test", 6, size=32)) is None


def test_labels_must_fit_the_pictures(blobs: Make) -> None:
    labels = label_set("a", "b")
    for targets in ([0], [0, 1, 2], [0, -1]):
        with pytest.raises(ValueError, match="2 blobs"):
            ZeroShotSet(source=blobs(2), labels=labels, targets=np.array(targets))


def test_a_label_is_the_mean_of_the_teachers_texts(clip: DualEncoder) -> None:
    templates = ("a {}", "{} picture")
    names = tuple(f"label {number}" for number in range(40))  # more texts than go in one batch
    labels = bake_labels_with_teacher(clip, names, templates)
    assert (labels.names, labels.templates, labels.space) == (names, templates, clip.space)
    assert len(labels.embedder) == 64
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
        ("missing.txt", "missing.txt does not exist"),
    ],
)
def test_what_cannot_be_read_is_one_line(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_label_names(given)
