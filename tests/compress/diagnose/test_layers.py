import copy

import numpy as np
import pytest
import torch

from edgeclip.compress.diagnose.layers import (
    TowerRun,
    are_noise,
    attention,
    embed_without,
    find_layers,
    hidden_states,
    is_noise,
)
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder

TEXTS = ["a", "a red cup on a table", "two cups"]


def image_run(model: DualEncoder) -> TowerRun:
    generator = torch.Generator().manual_seed(0)
    side = model.image_spec.size
    return TowerRun(model, "image", torch.randn(3, 3, side, side, generator=generator))


def text_run(model: DualEncoder) -> TowerRun:
    return TowerRun(model, "text", model.tokenize(TEXTS))


def test_layers_are_those_of_the_model(teacher: DualEncoder) -> None:
    model = teacher.model
    for run, name in ((image_run(teacher), "vision_model"), (text_run(teacher), "text_model")):
        layers = find_layers(run)
        assert layers == tuple(model.get_submodule(f"{name}.encoder.layers").children())
        states = hidden_states(run, layers)
        assert [item.shape for item in states] == [(3, 64)] * len(layers)


def test_padding_is_no_part_of_a_text(teacher: DualEncoder) -> None:
    run = text_run(teacher)
    layers = find_layers(run)
    together = hidden_states(run, layers)
    alone = hidden_states(TowerRun(teacher, "text", teacher.tokenize(TEXTS[:1])), layers)
    for one, other in zip(together, alone, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)


def test_a_tower_without_a_layer_is_the_tower_that_never_had_it(teacher: DualEncoder) -> None:
    shorter = copy.deepcopy(teacher)
    layers = shorter.model.get_submodule("vision_model.encoder.layers")
    assert isinstance(layers, torch.nn.ModuleList)
    del layers[1]
    run = image_run(teacher)
    found = embed_without(run, [find_layers(run)[1]])
    assert found == pytest.approx(embed_without(image_run(shorter), ()), abs=1e-6)
    assert not np.allclose(found, embed_without(run, ()))  # and nothing stays left out


def test_attention_of_a_tower_that_looks_everywhere_alike(teacher: DualEncoder) -> None:
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                weight.zero_()
    found = attention(image_run(model), shown=2)
    assert found is not None
    assert found.entropy == pytest.approx(np.ones((4, 2)))
    assert found.maps is not None
    assert found.maps.shape[0] == 2
    assert found.maps.sum(axis=(1, 2)) == pytest.approx([1, 1])
    text = attention(text_run(model), shown=2)  # causal, and padding is not counted
    assert text is not None
    assert text.entropy == pytest.approx(np.ones((2, 2)))
    assert text.maps is None


def test_a_convolutional_tower_has_layers_and_no_attention(teacher: DualEncoder) -> None:
    shape = StudentShape(family="convolutional", conv_widths=(8, 16), conv_depths=(1, 2))
    run = image_run(new_student(teacher, shape).eval())
    layers = find_layers(run)
    assert [item.shape[1] for item in hidden_states(run, layers)] == [8, 16, 16]
    assert attention(run, shown=1) is None


def test_weights_are_noise_until_something_is_learned() -> None:
    torch.manual_seed(0)
    first = torch.nn.Linear(48, 64)
    layer = torch.nn.Sequential(first, torch.nn.Linear(64, 48))
    assert is_noise(layer)
    with torch.no_grad():
        first.weight += 0.2 * torch.outer(torch.ones(64), torch.randn(48))
    assert not is_noise(layer)
    assert not is_noise(torch.nn.LayerNorm(48))


def test_no_layer_stands_out_of_a_tower_that_was_never_trained(teacher: DualEncoder) -> None:
    layers = find_layers(text_run(teacher))
    assert [is_noise(layer) for layer in layers] == [False, True]  # the first is missed
    assert are_noise(layers) == [False, False]
    trained = copy.deepcopy(layers[0])
    with torch.no_grad():
        weight = next(own for own in trained.parameters() if own.dim() > 1)
        weight.add_(0.2 * torch.outer(torch.randn(64), torch.randn(64)))
    assert are_noise([trained, layers[1]]) == [False, True]


def test_a_random_layer_of_many_matrices_is_missed_in_5_percent() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(*(torch.nn.Linear(24, 32) for _ in range(6))) for _ in range(150)]
    missed = 150 - sum(is_noise(layer, seed=seed) for seed, layer in enumerate(layers))
    assert missed <= 16  # with 5% more are missed once in 1,000 runs
