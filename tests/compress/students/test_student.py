"""Students inherit weights from the teacher, and have the shape that was asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, VisionTextDualEncoderModel

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError

WHOLE = StudentShape(image_heads=2, image_layers=4, whole_text=True)
SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
CONVOLUTIONAL = StudentShape(
    family="convolutional", text_heads=1, text_layers=1, conv_widths=(8, 16), conv_depths=(1, 1)
)
SOURCE = EmojiSource("test", 5, size=32)


def _same_answers(one: DualEncoder, other: DualEncoder) -> bool:
    pairs = zip(embed_source(one, SOURCE), embed_source(other, SOURCE), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_student_of_full_size_is_the_teacher(teacher: DualEncoder) -> None:
    student = new_student(teacher, WHOLE)
    assert _same_answers(student, teacher)
    assert space_fingerprint(student) == space_fingerprint(teacher)


def test_heads_keep_their_size(teacher: DualEncoder) -> None:
    student = new_student(teacher, SMALL)
    for tower in ("vision_config", "text_config"):
        ours, theirs = getattr(student.model.config, tower), getattr(teacher.model.config, tower)
        assert theirs.hidden_size // theirs.num_attention_heads == 32
        assert ours.hidden_size // ours.num_attention_heads == 32
        assert ours.intermediate_size == 4 * ours.hidden_size == 128
    assert student.model.config.vision_config.num_hidden_layers == 2
    assert student.model.config.text_config.num_hidden_layers == 1


def test_channels_and_layers_come_from_the_teacher(teacher: DualEncoder) -> None:
    ours, theirs = new_student(teacher, SMALL).model.state_dict(), teacher.model.state_dict()
    query = "vision_model.encoder.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(ours[query.format(0)], theirs[query.format(0)][:32, :32])
    assert torch.equal(ours[query.format(1)], theirs[query.format(2)][:32, :32])
    projection = "visual_projection.weight"
    assert torch.equal(ours[projection], theirs[projection][:, :32])


@pytest.mark.parametrize("shape", [SMALL, CONVOLUTIONAL], ids=["inherited", "convolutional"])
def test_a_student_shares_space_spec_and_temperature(
    teacher: DualEncoder, shape: StudentShape
) -> None:
    student = new_student(teacher, shape)
    assert student.spec == teacher.spec
    assert not student.model.logit_scale.requires_grad
    assert sum(w.numel() for w in student.parameters()) < sum(
        w.numel() for w in teacher.parameters()
    )
    image, text = embed_source(student, SOURCE)
    assert image.shape == text.shape == (5, 32)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(5))


def test_making_a_student_leaves_the_teacher_alone(teacher: DualEncoder) -> None:
    before, config = space_fingerprint(teacher), teacher.model.config.to_dict()
    student = new_student(teacher, SMALL)
    with torch.no_grad():
        for weight in student.parameters():
            weight.zero_()
    assert space_fingerprint(teacher) == before
    assert teacher.model.config.to_dict() == config
    assert teacher.model.logit_scale.requires_grad


def test_the_same_seed_gives_the_same_student(teacher: DualEncoder) -> None:
    spaces = [
        space_fingerprint(new_student(teacher, CONVOLUTIONAL, seed=seed)) for seed in (0, 0, 1)
    ]
    assert spaces[0] == spaces[1] != spaces[2]


def test_inherited_student_survives_saving(teacher: DualEncoder, tmp_path: Path) -> None:
    student = new_student(teacher, SMALL)
    student.save(tmp_path / "student")
    assert _same_answers(DualEncoder.load(tmp_path / "student"), student)
    model = CLIPModel.from_pretrained(tmp_path / "student")
    theirs, ours = model.state_dict(), student.model.state_dict()
    assert theirs["visual_projection.weight"].shape == (32, 32)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_convolutional_student_survives_saving(teacher: DualEncoder, tmp_path: Path) -> None:
    student = new_student(teacher, CONVOLUTIONAL)
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == student.space == space_fingerprint(teacher)
    assert loaded.space != space_fingerprint(loaded)
    assert _same_answers(loaded, student)
    assert space_fingerprint(loaded) == space_fingerprint(student)
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "student")
    ours = student.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


def test_convolutional_student_keeps_the_teachers_texts(teacher: DualEncoder) -> None:
    shape = StudentShape(
        family="convolutional",
        whole_text=True,
        conv_widths=(8,),
        conv_depths=(1,),
    )
    student = new_student(teacher, shape)
    assert torch.equal(embed_source(student, SOURCE)[1], embed_source(teacher, SOURCE)[1])


@pytest.mark.parametrize(
    "sizes",
    [
        {"family": "convnextv2", "image_heads": 2},
        {"family": "convolutional", "image_layers": 2},
        {"family": "levit", "patch_size": 16},
        {"conv_widths": (8, 16)},
        {"conv_depths": (1, 1)},
    ],
)
def test_sizes_of_another_family_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"has no {list(sizes)[-1]}: leave out, or choose"):
        StudentShape(**sizes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (StudentShape(image_heads=3), "a student can only be smaller"),
        (StudentShape(image_layers=5), "a student of 5 layers cannot inherit from a teacher of 4"),
        (StudentShape(text_heads=3), "a student can only be smaller"),
        (StudentShape(text_layers=3), "choose 1 to 2"),
        (StudentShape(image_heads=0), "at least one attention head and one layer, got 0 and 2"),
        (StudentShape(image_layers=0), "at least one attention head and one layer, got 1 and 0"),
        (StudentShape(text_layers=-1), "got 1 and -1"),
        (
            StudentShape(family="convolutional", conv_widths=(8, 16), conv_depths=(1,)),
            "one number for each stage",
        ),
    ],
)
def test_impossible_shapes(teacher: DualEncoder, shape: StudentShape, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_student(teacher, shape)


def test_no_smaller_convnext_inherits(teacher: DualEncoder) -> None:
    with pytest.raises(ConfigError, match=r"a convnext, is no plain transformer.*convolutional"):
        new_student(new_student(teacher, CONVOLUTIONAL), SMALL)


def test_sizes_that_are_not_given_are_half_the_teachers(teacher: DualEncoder) -> None:
    student = new_student(teacher, StudentShape())
    for part in ("vision_config", "text_config"):
        ours, theirs = (getattr(model.model.config, part) for model in (student, teacher))
        assert ours.num_hidden_layers == (theirs.num_hidden_layers + 1) // 2
        assert ours.num_attention_heads == (theirs.num_attention_heads + 1) // 2
        assert ours.hidden_size == theirs.hidden_size // 2
