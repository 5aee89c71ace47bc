"""Maps of a teacher's weights begin as the selection, and are folded into plain weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.importance import Importance, measure_importance
from edgeclip.compress.students.inherit import Choice
from edgeclip.compress.students.mapping import fold, with_maps
from edgeclip.compress.students.student import StudentShape, chosen, inheritance, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import ARCHITECTURES, FAMILIES

SOURCE = EmojiSource("train", 24, size=32)
TEST = EmojiSource("test", 5, size=32)
HALF = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1, inherit="mapped")


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(one, other, strict=True))


def _maps(student: DualEncoder) -> list[nn.Parameter]:
    return list(student.get_submodule("maps").parameters())


def _disturb(student: DualEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own in _maps(student):
            own.add_(0.02 * torch.randn(own.shape, generator=generator))


def _check(teacher: DualEncoder, shape: StudentShape, importance: Importance) -> DualEncoder:
    """The maps begin as the selection, all have a gradient, and folding them changes nothing."""
    student = new_student(teacher, shape, importance=importance)
    before = embed_source(student, TEST)
    names = [name for name, own in student.named_parameters() if own.requires_grad]
    choice = chosen(student, teacher, shape, importance)
    mapped = with_maps(student, *inheritance(student, teacher, shape), choice)
    assert mapped is not None
    assert _apart(embed_source(mapped, TEST), before) < 1e-5
    trained = [own for own in mapped.parameters() if own.requires_grad]
    assert {id(own) for own in trained} == {id(own) for own in _maps(mapped)}
    image = mapped.embed_image(mapped.preprocess([TEST[0].image]))
    text = mapped.embed_text(mapped.tokenize(["red apple", "an eagle"]))
    (image[0, 0] + text[0, 0]).backward()
    assert all(own.grad is not None for own in trained)
    _disturb(mapped)
    disturbed = embed_source(mapped, TEST)
    assert _apart(disturbed, before) > 1e-3
    assert _apart(embed_source(student, TEST), before) == 0
    fold(mapped, student)
    assert _apart(embed_source(student, TEST), disturbed) < 1e-5
    assert [name for name, own in student.named_parameters() if own.requires_grad] == names
    return student


def test_maps_begin_as_the_selection_and_are_folded(teacher: DualEncoder, tmp_path: Path) -> None:
    student = _check(teacher, HALF, measure_importance(teacher, SOURCE, inputs=16))
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert _apart(embed_source(loaded, TEST), embed_source(student, TEST)) < 1e-6
    assert loaded.space == teacher.space


def test_a_student_of_full_size_has_no_maps(teacher: DualEncoder) -> None:
    shape = StudentShape(image_heads=2, image_layers=4, whole_text=True, inherit="mapped")
    importance = measure_importance(teacher, SOURCE, inputs=4)
    student = new_student(teacher, shape, importance=importance)
    choice = chosen(student, teacher, shape, importance)
    assert with_maps(student, *inheritance(student, teacher, shape), choice) is None
    assert _apart(embed_source(student, TEST), embed_source(teacher, TEST)) == 0


class _Student(nn.Module):
    """A model of one weight, of layer 0 of a text tower's."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.model = nn.Module()
        place = self.model
        *path, kind = name.split(".")
        for part in path:
            place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(kind, nn.Parameter(weight))


def _folded(
    name: str,
    theirs: list[Tensor],
    units: dict[str, Tensor],
    shape: tuple[int, ...],
    change: Callable[[list[nn.Parameter]], None],
) -> list[list[float]]:
    student = _Student(f"text_model.layers.0.{name}", torch.zeros(shape))
    source = {f"text_model.layers.{number}.{name}": own for number, own in enumerate(theirs)}
    choice = Choice(units=units, layers={"text_model.layers.": (1,)})
    mapped = with_maps(student, [f"text_model.layers.0.{name}"], source, choice)
    assert mapped is not None
    with torch.no_grad():
        change(list(mapped.get_submodule("maps").parameters()))
    fold(mapped, student)
    found: list[list[float]] = student.model.get_parameter(f"text_model.layers.0.{name}").tolist()
    return found


def test_a_map_by_hand() -> None:
    """W = 0.5 W0 + W1, of which A_out adds row 0 to row 1, and A_in takes twice column 0."""
    theirs = [torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[1.0, 5.0], [3.0, 7.0]])]
    units = {"text_model": torch.tensor([0]), "text_model.layers.1 neurons": torch.tensor([1])}

    def change(maps: list[nn.Parameter]) -> None:
        factors, out, into = maps
        assert factors.tolist() == [0, 1]
        assert (out.tolist(), into.tolist()) == ([[0, 1]], [[1, 0]])
        factors[0], out[0, 0], into[0, 0] = 0.5, 1.0, 2.0

    assert _folded("mlp.fc1.weight", theirs, units, (1, 1), change) == [[2 * (3 + 1 + 2 + 1)]]


def test_a_joint_weight_maps_query_key_and_value_alike() -> None:
    theirs = [torch.zeros(6, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])]
    units = {"text_model.layers.1 heads": torch.tensor([0])}

    def change(maps: list[nn.Parameter]) -> None:
        maps[1][0, 1] = 10.0

    found = _folded("attention.qkv", theirs, units, (3, 1), change)
    assert found == [[21.0], [43.0], [65.0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"convnext_and_roberta"}))
def test_every_family_is_selected_and_mapped(name: str, tmp_path: Path) -> None:
    teacher = DualEncoder.load(FAMILIES[name](tmp_path / name).folder)
    importance = measure_importance(teacher, SOURCE, inputs=8)
    narrow = StudentShape(
        image_heads=1, image_layers=1, text_heads=1, text_layers=1, image_size=48, inherit="mapped"
    )
    _check(teacher, narrow, importance)
    whole = StudentShape(image_heads=2, image_layers=2, whole_text=True, inherit="selected")
    student = new_student(teacher, whole, importance=importance)
    assert _apart(embed_source(student, TEST), embed_source(teacher, TEST)) < 1e-6


@pytest.mark.slow
def test_the_text_tower_beside_a_convolutional_one_is_mapped(tmp_path: Path) -> None:
    teacher = DualEncoder.load(FAMILIES["convnext_and_roberta"](tmp_path / "teacher").folder)
    importance = measure_importance(teacher, SOURCE, inputs=8)
    shape = StudentShape(
        family="convolutional",
        conv_widths=(8,),
        conv_depths=(1,),
        text_heads=1,
        text_layers=1,
        inherit="mapped",
    )
    student = new_student(teacher, shape, importance=importance)
    choice = chosen(student, teacher, shape, importance)
    mapped = with_maps(student, *inheritance(student, teacher, shape), choice)
    assert mapped is not None
    assert _maps(mapped)
    trained = {name for name, own in mapped.named_parameters() if own.requires_grad}
    assert "model.visual_projection.weight" in trained
    assert not any(name.startswith("model.text_model") for name in trained)


@pytest.mark.slow
def test_units_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    teacher = DualEncoder.load(FAMILIES["dinov2_and_clip"](tmp_path / "teacher").folder)
    sizes = teacher.model.config.vision_config.to_dict()
    gated = Dinov2Config(**{**sizes, "use_swiglu_ffn": True})
    teacher.model.vision_model = Dinov2Model(gated)
    teacher.model.config.vision_config = gated
    importance = measure_importance(teacher, SOURCE, inputs=4)
    shape = StudentShape(image_heads=1, image_layers=1, whole_text=True, inherit="selected")
    new_student(teacher, StudentShape(image_heads=1, image_layers=1, whole_text=True))
    with pytest.raises(ConfigError, match=r"units of an unknown kind.*choose --inherit leading"):
        new_student(teacher, shape, importance=importance)
