"""Students inherit weights from the teacher, and have the shape that was asked for."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPModel, VisionTextDualEncoderModel

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, even_stride, inherit, new_student
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


def test_convolutional_student_ignores_the_sizes_of_the_other_family(
    teacher: DualEncoder,
) -> None:
    shape = StudentShape(family="convolutional", image_heads=99, image_layers=99)
    assert new_student(teacher, shape).spec == teacher.spec


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


@given(st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))))
def test_even_stride_is_even(layers: tuple[int, int]) -> None:
    teacher, student = layers
    kept = even_stride(teacher, student)
    assert len(kept) == len(set(kept)) == student
    assert list(kept) == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] < teacher
    gaps = {later - earlier for earlier, later in pairwise(kept)}
    stride = teacher / student
    assert all(abs(gap - stride) <= 1 + 1e-9 for gap in gaps)
    assert all(abs(layer - number * stride) <= 0.5 + 1e-9 for number, layer in enumerate(kept))


def test_even_stride_by_hand() -> None:
    assert even_stride(12, 12) == tuple(range(12))
    assert even_stride(12, 6) == (0, 2, 4, 6, 8, 10)
    assert even_stride(12, 4) == (0, 3, 6, 9)
    assert even_stride(12, 1) == (0,)
    assert even_stride(8, 3) == (0, 3, 5)


@pytest.mark.parametrize("student", [-1, 0, 5])
def test_even_stride_of_too_many_or_none(student: int) -> None:
    with pytest.raises(ConfigError, match=f"student of {student} layers cannot .* choose 1 to 4"):
        even_stride(4, student)


class _Tower(nn.Module):
    def __init__(self, width: int, layers: int, extra: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        if extra:
            self.head = nn.Linear(width, 1)


def _linear(layers: nn.Module, number: int) -> nn.Linear:
    layer = layers.get_submodule(str(number))
    assert isinstance(layer, nn.Linear)
    return layer


def test_leading_channels_of_evenly_spread_layers() -> None:
    teacher, student = _Tower(8, 6), _Tower(5, 3)
    inherit(student, teacher)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight[:5])
    assert torch.equal(student.embedding.bias, teacher.embedding.bias[:5])
    ours, theirs = (tower.get_submodule("encoder.layers") for tower in (student, teacher))
    for number, origin in enumerate((0, 2, 4)):
        kept, whole = _linear(ours, number), _linear(theirs, origin)
        assert torch.equal(kept.weight, whole.weight[:5, :5])
        assert torch.equal(kept.bias, whole.bias[:5])


def test_the_student_owns_its_weights() -> None:
    teacher, student = _Tower(4, 2), _Tower(4, 2)
    inherit(student, teacher)
    before = teacher.embedding.weight.clone()
    with torch.no_grad():
        student.embedding.weight.zero_()
    assert torch.equal(teacher.embedding.weight, before)


def test_a_wider_student_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embedding.weight: the student wants \(9, 3\), the tea"):
        inherit(_Tower(9, 2), _Tower(8, 2))


def test_a_deeper_student_is_refused() -> None:
    with pytest.raises(ConfigError, match="student of 3 layers cannot inherit from a teacher of 2"):
        inherit(_Tower(8, 3), _Tower(8, 2))


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the teacher has no weight head\.weight"):
        inherit(_Tower(4, 2, extra=True), _Tower(4, 2))
