"""Students of teachers of every family, and students that begin as an existing model."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, adopt_student, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import ARCHITECTURES, FAMILIES

pytestmark = pytest.mark.slow

SOURCE = EmojiSource("test", 5, size=32)
WHOLE = StudentShape(image_heads=2, image_layers=2, whole_text=True)
NARROW = StudentShape(image_heads=1, image_layers=1, text_heads=1, text_layers=1)
CONVOLUTIONAL = StudentShape(family="convolutional", conv_widths=(8, 16), conv_depths=(1, 1))
_MADE: dict[str, DualEncoder] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def _teacher(name: str, folder: Path) -> DualEncoder:
    if name not in _MADE:
        _MADE[name] = DualEncoder.load(FAMILIES[name](folder / name).folder)
    return _MADE[name]


TRANSFORMERS = sorted(set(ARCHITECTURES) - {"convnext_and_roberta"})


def _apart(one: DualEncoder, other: DualEncoder) -> tuple[float, float]:
    pairs = zip(embed_source(one, SOURCE), embed_source(other, SOURCE), strict=True)
    image, text = (float((ours - theirs).abs().max()) for ours, theirs in pairs)
    return image, text


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_student_of_full_size_is_the_teacher(name: str, folder: Path) -> None:
    teacher = _teacher(name, folder)
    student = new_student(teacher, WHOLE)
    assert max(_apart(student, teacher)) < 1e-6
    assert space_fingerprint(student) == space_fingerprint(teacher)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_smaller_student_inherits_and_survives_saving(
    name: str, folder: Path, tmp_path: Path
) -> None:
    teacher = _teacher(name, folder)
    student = new_student(teacher, NARROW)
    assert student.spec == teacher.spec
    assert student.weight_bytes < teacher.weight_bytes
    state = teacher.model.state_dict()
    assert any(
        torch.equal(weight, state[key][: len(weight)])
        for key, weight in student.model.state_dict().items()
        if key.startswith("vision_model") and weight.dim() == 1
    )
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space
    assert max(_apart(loaded, student)) < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_that_is_trained_has_a_gradient(name: str, folder: Path) -> None:
    teacher = _teacher(name, folder)
    shapes = [CONVOLUTIONAL] if name == "convnext_and_roberta" else [CONVOLUTIONAL, WHOLE, NARROW]
    for student in (*(new_student(teacher, shape) for shape in shapes), _adopted(teacher)):
        student.train()
        pictures = [SOURCE[index].image for index in range(len(SOURCE))]
        image = student.embed_image(student.preprocess(pictures))
        text = student.embed_text(student.tokenize(["red apple", "an eagle"]))
        (image[0, 0] + text[0, 0]).backward()
        trained = {name: item for name, item in student.named_parameters() if item.requires_grad}
        assert not [name for name, weight in trained.items() if weight.grad is None]


def _adopted(teacher: DualEncoder) -> DualEncoder:
    return adopt_student(teacher, teacher)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("whole_text", [True, False])
def test_a_convolutional_tower_stands_beside_any_text_tower(
    name: str, whole_text: bool, folder: Path, tmp_path: Path
) -> None:
    teacher = _teacher(name, folder)
    shape = copy.copy(CONVOLUTIONAL)
    if whole_text:
        shape = StudentShape(
            family="convolutional", conv_widths=(8,), conv_depths=(1,), whole_text=True
        )
    student = new_student(teacher, shape)
    if whole_text:
        assert _apart(student, teacher)[1] < 1e-6
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert max(_apart(loaded, student)) < 1e-6
    assert loaded.spec == teacher.spec


def test_a_convnext_teacher_has_no_inherited_student(folder: Path) -> None:
    teacher = _teacher("convnext_and_roberta", folder)
    with pytest.raises(ConfigError, match=r"a convnext, is no plain transformer.*convolutional"):
        new_student(teacher, NARROW)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(("size", "patch"), [(48, None), (None, 16), (64, 16)])
def test_pictures_and_patches_may_have_another_size(
    name: str, size: int | None, patch: int | None, folder: Path, tmp_path: Path
) -> None:
    teacher = _teacher(name, folder)
    shape = StudentShape(
        image_heads=2, image_layers=2, whole_text=True, image_size=size, patch_size=patch
    )
    student = new_student(teacher, shape)
    assert student.spec.image.size == (size or 32)
    config = student.model.config.vision_config
    assert (config.image_size, config.patch_size) == (size or 32, patch or 8)
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert max(_apart(loaded, student)) < 1e-6
    if size == 64:  # the same grid, of pictures and patches twice as large
        theirs, ours = (embed_source(model, SOURCE)[0] for model in (teacher, student))
        assert (theirs * ours).sum(-1).mean() > 0.8


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "convnext_and_roberta"])
@pytest.mark.parametrize("of", ["clip", "siglip"])
def test_an_existing_model_becomes_a_student(
    name: str, of: str, folder: Path, tmp_path: Path
) -> None:
    """Longer embeddings keep their cosines; shorter ones are a projection."""
    model, teacher = _teacher(name, folder), _teacher(of, folder)
    before = space_fingerprint(model)
    student = adopt_student(model, teacher)
    assert space_fingerprint(model) == before
    assert student.spec.dim == teacher.spec.dim
    assert student.spec.text == model.spec.text
    assert student.spec.image == model.spec.image
    assert student.spec.logit_scale == pytest.approx(teacher.spec.logit_scale)
    assert student.space == teacher.space
    if model.spec.dim <= teacher.spec.dim:
        (image, text), (own, words) = embed_source(student, SOURCE), embed_source(model, SOURCE)
        torch.testing.assert_close(image @ text.T, own @ words.T, atol=1e-5, rtol=0)
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space
    assert max(_apart(loaded, student)) < 1e-6


@pytest.mark.parametrize(
    "shape",
    [NARROW, replace(CONVOLUTIONAL, text_heads=1, text_layers=1)],
    ids=["inherited", "convolutional"],
)
@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "vit_and_bert"])
def test_activations_computed_again_give_the_same_gradients(
    name: str, shape: StudentShape, folder: Path
) -> None:
    teacher = _teacher(name, folder)
    plain = new_student(teacher, shape).train()
    saving = copy.deepcopy(plain)
    saving.checkpoint_gradients()
    passes = []
    for module in saving.model.get_submodule("text_model").modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: passes.append(True))
    pixels, ids = saving.preprocess([SOURCE[0].image]), saving.tokenize(["two red cars", "a dog"])
    gradients, made = [], []
    for student in (plain, saving):
        torch.manual_seed(0)
        loss = (student.embed_image(pixels)[:, 0].sum() + student.embed_text(ids)[:, 0]).sum()
        made.append(len(passes))
        loss.backward()
        made.append(len(passes))
        gradients.append({key: own.grad for key, own in student.named_parameters()})
    assert made[3] > made[2] > made[1] == 0
    for key, wanted in gradients[0].items():
        found = gradients[1][key]
        assert (found is None) is (wanted is None), key
        if wanted is not None:
            torch.testing.assert_close(found, wanted, msg=key)
