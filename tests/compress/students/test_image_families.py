"""Image towers of every family: made, trained, saved, and refused where their sizes cannot be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EfficientNetModel, MobileViTV2Model

from edgeclip.compress.students.image_families import (
    IMAGE_FAMILIES,
    ImageFamilyName,
    image_tower,
)
from edgeclip.compress.students.student import new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.multi_scale import AttentionPool
from edgeclip.compress.train.distill import switch_off_dropout
from edgeclip.runtime.errors import ConfigError
from tests.compress.students.image_shapes import SHAPES


def _pixels(count: int = 4, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_family_has_a_shape_here() -> None:
    assert SHAPES.keys() == IMAGE_FAMILIES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_student_learns_and_survives_saving(
    name: ImageFamilyName, teacher: DualEncoder, tmp_path: Path
) -> None:
    student = new_student(teacher, SHAPES[name])
    assert student.spec.dim == teacher.spec.dim
    assert student.space == space_fingerprint(teacher)
    switch_off_dropout(student)
    tower = student.model.get_submodule("vision_model")
    pixels, wanted = _pixels(), nn.functional.normalize(torch.eye(4, teacher.spec.dim), dim=-1)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    losses = []
    student.train()
    for _ in range(12):
        loss = (1 - (student.embed_image(pixels) * wanted).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert not [key for key, own in tower.named_parameters() if own.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        for _ in range(40):  # running statistics lag behind twelve steps
            student.embed_image(pixels)
    student.eval()
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.embed_image(pixels), student.embed_image(pixels), atol=1e-6, rtol=0
        )
    assert loaded.space == student.space
    assert space_fingerprint(loaded) == space_fingerprint(student)


@pytest.mark.parametrize("name", SHAPES)
def test_the_usual_sizes_fit_pictures_of_the_built_in_teacher(name: ImageFamilyName) -> None:
    tower: Any = image_tower(name, None, None, 64)
    assert tower.config.hidden_size >= 192
    for module in tower.modules():  # norms of nearly nothing would not learn
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.weight.min() == 1


@pytest.mark.parametrize(
    ("name", "widths", "depths", "size", "message"),
    [
        ("convolutional", (8, 16), (1,), 64, "one number for each stage"),
        ("convolutional", (8,) * 4, (1,) * 4, 16, "16 pixels is too small .* which need 32"),
        ("convnextv2", (8, 0), (1, 1), 64, "above 0; got 8 0"),
        ("convnextv2", (8, 16), (1, -1), 64, "is at least 0; got 1 -1"),
        ("swiftformer", (8, 16), (1, 0), 64, "is at least 1; got 1 0"),
        ("mobilevitv2", (64, 96), (1, 1), 64, "one --conv-widths"),
        ("mobilevitv2", (100,), (1, 1, 1), 64, "multiple of 64"),
        ("mobilevitv2", (64,), (1, 1, 1), 56, "multiple of 16, at least 32 pixels, not 56"),
        ("swiftformer", (8,), (2,), 64, "has 2 to 8 stages, not 1"),
        ("efficientnet", (8, 12), (1, 1), 64, "multiple of 8"),
        ("efficientnet", (8,) * 5, (1,) * 5, 16, "too small"),
        ("levit", (32, 64), (1, 1), 64, "has 3 stages, not 2"),
        ("levit", (32, 64, 96), (1, 1, 1), 48, "48 pixels is too small .* which need 64"),
        ("levit", (32, 64, 96), (1, 1, 1), 72, "multiple of 16 pixels, not 72"),
        ("multi-scale", (8, 16, 32), (1, 1, 1), 40, "multiple of 16 pixels, not 40"),
        ("multi-scale", (8, 16), (1, 1), 64, "has 3 to 8 stages, not 2"),
    ],
)
def test_sizes_that_cannot_be(
    name: ImageFamilyName, widths: Any, depths: Any, size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        image_tower(name, widths, depths, size)


def test_efficientnet_has_the_channels_that_were_asked_for() -> None:
    widths = (16, 24, 40, 80, 112, 192, 320)
    tower: Any = image_tower("efficientnet", widths, (1, 2, 2, 3, 3, 4, 1), 128)
    made = [block.projection.project_bn.num_features for block in tower.encoder.blocks]
    assert tuple(dict.fromkeys(made)) == widths
    assert tower.embeddings.out_dim == 32  # EfficientNet-B0


@pytest.mark.parametrize(("size", "stride"), [(32, 8), (64, 16), (224, 16), (256, 32)])
def test_mobilevit_keeps_four_places_a_side(size: int, stride: int) -> None:
    tower: Any = image_tower("mobilevitv2", (64,), (1, 1, 1), size)
    assert tower.config.output_stride == stride


@pytest.mark.parametrize(
    ("name", "theirs"), [("mobilevitv2", MobileViTV2Model), ("efficientnet", EfficientNetModel)]
)
def test_towers_answer_as_in_transformers(name: ImageFamilyName, theirs: Any) -> None:
    shape = SHAPES[name]
    ours = image_tower(name, shape.conv_widths, shape.conv_depths, 64).eval()
    same = theirs(ours.config).eval()
    same.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        found, wanted = (model(pixel_values=_pixels()).pooler_output for model in (ours, same))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_levit_forgets_the_biases_of_weights_before(teacher: DualEncoder) -> None:
    student = new_student(teacher, SHAPES["levit"]).eval()
    with torch.inference_mode():
        before = student.embed_image(_pixels())
    state = student.state_dict()
    for key in state:
        if key.endswith("attention_biases"):
            state[key] = torch.randn(state[key].shape)
    student.load_state_dict(state)
    with torch.inference_mode():
        assert not torch.allclose(student.embed_image(_pixels()), before, atol=1e-4)


def test_attention_with_a_query_of_zeros_is_the_mean() -> None:
    pool = AttentionPool(8, 2)
    for linear in (pool.value, pool.out):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    last = pool.mlp[2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    places = _pixels(1, 5).flatten(2)[:, :, :8]  # 3 places of width 8
    torch.testing.assert_close(pool(places), places.mean(dim=1))


def test_pictures_of_another_size_are_told_in_time(teacher: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="choose a larger --image-size"):
        new_student(teacher, replace(SHAPES["levit"], image_size=None))  # the teacher's 32


def test_settings_that_no_weight_tells_are_part_of_the_space(teacher: DualEncoder) -> None:
    student = new_student(teacher, SHAPES["mobilevitv2"])
    before = space_fingerprint(student)
    student.model.config.vision_config.output_stride = 8
    assert space_fingerprint(student) != before
