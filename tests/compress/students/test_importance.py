"""The units and layers that matter to the embeddings are found, and chosen."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.importance import Importance, choose, measure_importance
from edgeclip.compress.students.student import StudentShape, chosen, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError
from tests.compress.students.image_shapes import SHAPES

SOURCE = EmojiSource("train", 40, size=32)
TEST = EmojiSource("test", 5, size=32)
HALF = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1, inherit="selected")
LAYER = "vision_model.encoder.layers.{}"


@pytest.fixture(scope="module")
def importance(teacher: DualEncoder) -> Importance:
    return measure_importance(teacher, SOURCE, held_out=8)


def _measured(
    teacher: DualEncoder, plant: Callable[[dict[str, Tensor]], None]
) -> tuple[Importance, DualEncoder]:
    """Measure a copy of the teacher whose weights were altered by `plant`."""
    planted = copy.deepcopy(teacher)
    with torch.no_grad():
        plant(planted.model.state_dict())
    return measure_importance(planted, SOURCE, held_out=8, inputs=16), planted


def test_planted_units_and_layers_are_found(teacher: DualEncoder) -> None:
    """The second half of all units matters, layers 1 and 3, and text layer 1."""

    def plant(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if name.endswith(("out_proj.weight", "fc2.weight", "projection.weight")):
                weight[:, : weight.shape[1] // 2] *= 1e-3
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
                weight[:, : weight.shape[1] // 2] *= 1e-3
            idle = [LAYER.format(0), LAYER.format(2), "text_model.encoder.layers.0"]
            if name.startswith(tuple(f"{layer}." for layer in idle)) and name.endswith(
                ("out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
            ):
                weight *= 1e-3

    found, planted = _measured(teacher, plant)
    choice = chosen(new_student(planted, HALF, importance=found), planted, HALF, found)
    assert choice.layers == {
        "vision_model.encoder.layers.": (1, 3),
        "text_model.encoder.layers.": (1,),
    }
    assert {"vision_model", "text_model", f"{LAYER.format(1)} heads"} < choice.units.keys()
    for group, kept in choice.units.items():
        half = len(kept)
        assert kept.tolist() == list(range(half, 2 * half)), group


def test_the_importance_of_a_head_is_the_change_of_the_embeddings(teacher: DualEncoder) -> None:
    """Held against central differences by a factor of what a head adds; 64 draws are 18% off."""
    source = EmojiSource("train", 16, size=32)
    found = measure_importance(teacher, source, held_out=0)
    pixels = teacher.preprocess([source[index].image for index in range(16)])
    altered = copy.deepcopy(teacher)
    weight = altered.model.get_parameter(f"{LAYER.format(2)}.self_attn.out_proj.weight").detach()
    step = 0.02
    for head, measured in enumerate(found.units[f"{LAYER.format(2)} heads"].tolist()):
        own = weight[:, 32 * head : 32 * (head + 1)]
        whole, ends = own.clone(), []
        for factor in (1 + step, 1 - step, 1):
            own.copy_(factor * whole)
            with torch.inference_mode():
                ends.append(altered.embed_image(pixels))
        exact = ((ends[0] - ends[1]) / (2 * step)).square().sum(dim=-1).mean()
        assert measured == pytest.approx(float(exact), rel=0.9)


def test_a_skipped_layer_that_does_nothing_changes_nothing(teacher: DualEncoder) -> None:
    def plant(weights: dict[str, Tensor]) -> None:
        for name in ("self_attn.out_proj", "mlp.fc2"):
            for kind in ("weight", "bias"):
                weights[f"{LAYER.format(1)}.{name}.{kind}"].zero_()

    found, _ = _measured(teacher, plant)
    layers = found.layers["vision_model.encoder.layers."].tolist()
    assert layers[1] == pytest.approx(0, abs=1e-6)
    assert min(layers[0], layers[2], layers[3]) > 1e-4


def test_the_same_seed_measures_the_same(teacher: DualEncoder, importance: Importance) -> None:
    before = space_fingerprint(teacher)
    again = measure_importance(teacher, SOURCE, held_out=8)
    other = measure_importance(teacher, SOURCE, held_out=8, seed=1)
    for name, own in importance.units.items():
        assert torch.equal(own, again.units[name])
        assert not torch.equal(own, other.units[name])
    assert space_fingerprint(teacher) == before
    assert all(weight.requires_grad for weight in teacher.parameters())


def test_a_student_of_full_size_is_the_teacher(
    teacher: DualEncoder, importance: Importance
) -> None:
    whole = StudentShape(
        image_heads=2, image_layers=4, text_heads=2, text_layers=2, inherit="selected"
    )
    student = new_student(teacher, whole, importance=importance)
    assert space_fingerprint(student) == space_fingerprint(teacher)


def test_a_norm_over_fewer_channels_is_scaled(teacher: DualEncoder, importance: Importance) -> None:
    """A channel of mean square 4 where the others have 2/3 is alone twice what it was."""
    student = new_student(teacher, HALF, importance=importance)
    weights, source = _state(student), _state(teacher)
    norm = "vision_model.post_layernorm"
    energies = {**importance.energies, norm: torch.full((64,), 2 / 3, dtype=torch.float64)}
    kept = chosen(student, teacher, HALF, importance).units["vision_model"]
    energies[norm][kept] = 4.0
    made = Importance(units=importance.units, layers=importance.layers, energies=energies)
    assert choose(made, weights, source).scales[norm] == pytest.approx(2.0)


def _state(dual: DualEncoder) -> dict[str, Tensor]:
    return {key: own for key, own in dual.model.state_dict().items() if key != "logit_scale"}


def test_a_selection_needs_to_be_measured(teacher: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="selected needs the importance"):
        new_student(teacher, HALF)


def test_random_inherits_nothing_but_a_whole_text_tower(teacher: DualEncoder) -> None:
    shape = StudentShape(inherit="random", whole_text=True)
    student = new_student(teacher, shape)
    assert torch.equal(embed_source(student, TEST)[1], embed_source(teacher, TEST)[1])
    ours, theirs = _state(student), _state(teacher)
    query = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ours[query], theirs[query][:32, :32])


def test_towers_that_are_no_plain_transformers_are_not_measured(teacher: DualEncoder) -> None:
    model = new_student(teacher, SHAPES["levit"]).eval()
    found = measure_importance(model, EmojiSource("train", 8, size=64), held_out=0, inputs=4)
    assert found.layers.keys() == {"text_model.encoder.layers."}
    assert "text_model" in found.units
    assert "vision_model" not in found.units
