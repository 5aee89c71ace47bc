"""Merged patches are the mean of their neighbours, and stay merged in files."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.students.token_merging import with_merging
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.own_settings import merged_patches
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError

SHAPE = StudentShape(image_heads=1, image_layers=3, text_heads=1, text_layers=1)
SOURCE = EmojiSource("test", 4, size=32)


def test_four_neighbours_become_their_mean() -> None:
    rows = torch.arange(17.0)[None, :, None]  # a class token, and patches 1 to 16 in four rows
    found = merged_patches(rows, side=4)
    assert found.flatten().tolist() == [0, 3.5, 5.5, 11.5, 13.5]
    assert merged_patches(rows[:, 1:], side=4).flatten().tolist() == [3.5, 5.5, 11.5, 13.5]


def test_an_odd_last_row_and_column_are_merged_in_pairs_and_alone() -> None:
    rows = torch.arange(10.0)[None, :, None]  # patches 1 2 3 / 4 5 6 / 7 8 9
    assert merged_patches(rows, side=3).flatten().tolist() == [0, 3, 4.5, 7.5, 9]


def test_later_layers_see_a_quarter_of_the_patches(teacher: DualEncoder) -> None:
    student = new_student(teacher, replace(SHAPE, merge_after=(1, 2)))
    seen: list[int] = []

    def note(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0].shape[1])

    layers = student.model.get_submodule("vision_model.encoder.layers")
    for layer in layers.children():
        layer.register_forward_pre_hook(note)
    student.embed_image(student.preprocess([SOURCE[0].image]))
    side = student.model.config.vision_config.patch_size
    count = (32 // side) ** 2
    assert seen == [1 + count, 1 + count // 4, 1 + count // 16]


def test_merging_is_recorded_and_changes_the_space_of_its_own(
    teacher: DualEncoder, tmp_path: Path
) -> None:
    plain = new_student(teacher, SHAPE)
    student = with_merging(plain, (1,))
    assert student.space == teacher.space
    assert space_fingerprint(student) != space_fingerprint(plain)
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space
    for other in (loaded, copy.deepcopy(student)):
        image, text = embed_source(other, SOURCE)
        ours, texts = embed_source(student, SOURCE)
        assert torch.equal(image, ours)
        assert torch.equal(text, texts)
    assert not torch.equal(embed_source(plain, SOURCE)[0], ours)


@pytest.mark.parametrize("after", [(0,), (3,), (2, 1), (1, 1)])
def test_layers_that_cannot_be_merged_after_are_refused(
    teacher: DualEncoder, after: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="layers 1 to 2 of 3"):
        new_student(teacher, replace(SHAPE, merge_after=after))


def test_a_convolutional_tower_has_no_patches_to_merge(teacher: DualEncoder) -> None:
    shape = StudentShape(
        family="convolutional",
        conv_widths=(8, 16),
        conv_depths=(1, 1),
        text_heads=1,
        text_layers=1,
        merge_after=(1,),
    )
    with pytest.raises(ConfigError, match="no ViT"):
        new_student(teacher, shape)
