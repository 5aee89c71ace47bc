"""A student is filled with a part of its teacher's weights: the leading one, or a chosen one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeclip.compress.students.inherit import Choice, even_stride, inherit
from edgeclip.runtime.errors import ConfigError


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
    inherit(student.state_dict(), teacher.state_dict())
    assert torch.equal(student.embedding.weight, teacher.embedding.weight[:5])
    assert torch.equal(student.embedding.bias, teacher.embedding.bias[:5])
    ours, theirs = (tower.get_submodule("encoder.layers") for tower in (student, teacher))
    for number, origin in enumerate((0, 2, 4)):
        kept, whole = _linear(ours, number), _linear(theirs, origin)
        assert torch.equal(kept.weight, whole.weight[:5, :5])
        assert torch.equal(kept.bias, whole.bias[:5])


def _joint(*rows: int) -> Tensor:
    return torch.tensor(rows).float()[:, None] * torch.tensor([[1.0, 100.0]])


def test_a_joint_weight_keeps_the_same_heads_of_query_key_and_value() -> None:
    name = "vision_model.layers.0.attention.in_proj_weight"
    theirs, ours = {name: _joint(1, 2, 3, 4, 5, 6)}, {name: torch.zeros(3, 1)}
    inherit(ours, theirs)
    assert ours[name].flatten().tolist() == [1, 3, 5]
    units = {"vision_model.layers.0 heads": torch.tensor([1]), "vision_model": torch.tensor([1])}
    inherit(ours, theirs, Choice(units=units, layers={"vision_model.layers.": (0,)}))
    assert ours[name].flatten().tolist() == [200, 400, 600]


def test_chosen_units_by_hand() -> None:
    """Two of four channels, one of two heads of one channel, one of three neurons, layer 1."""
    layer: dict[str, tuple[int, ...]] = {
        "attention.q_proj.weight": (2, 4),
        "attention.o_proj.weight": (4, 2),
        "attention.o_proj.bias": (4,),
        "mlp.fc1.weight": (3, 4),
        "mlp.fc2.weight": (4, 3),
        "norm1.weight": (4,),
    }
    outside: dict[str, tuple[int, ...]] = {"embeddings.word.weight": (5, 4)}
    theirs = {
        f"text_model.{place}{name}": torch.randn(shape)
        for place, names in (("", outside), ("layers.0.", layer), ("layers.1.", layer))
        for name, shape in names.items()
    } | {"text_projection.weight": torch.randn(4, 4)}
    kept, head, neuron = torch.tensor([1, 3]), torch.tensor([1]), torch.tensor([2])
    choice = Choice(
        units={
            "text_model": kept,
            "text_model.layers.1 heads": head,
            "text_model.layers.1 neurons": neuron,
        },
        layers={"text_model.layers.": (1,)},
        scales={"text_model.layers.1.norm1": 0.5},
    )
    sizes: dict[str, tuple[int, ...]] = {
        "attention.q_proj.weight": (1, 2),
        "attention.o_proj.weight": (2, 1),
    }
    sizes |= {"attention.o_proj.bias": (2,), "norm1.weight": (2,)}
    sizes |= {"mlp.fc1.weight": (1, 2), "mlp.fc2.weight": (2, 1)}
    ours = {f"text_model.layers.0.{name}": torch.zeros(shape) for name, shape in sizes.items()}
    ours["text_model.embeddings.word.weight"] = torch.zeros(5, 2)
    ours["text_projection.weight"] = torch.zeros(4, 2)  # the embedding keeps its length
    inherit(ours, theirs, choice)
    found = {name.removeprefix("text_model.layers.0."): own for name, own in ours.items()}
    whole = {name.removeprefix("text_model.layers.1."): own for name, own in theirs.items()}
    wanted = {
        "attention.q_proj.weight": whole["attention.q_proj.weight"][1:, kept],
        "attention.o_proj.weight": whole["attention.o_proj.weight"][kept, 1:],
        "attention.o_proj.bias": whole["attention.o_proj.bias"][kept],
        "mlp.fc1.weight": whole["mlp.fc1.weight"][2:, kept],
        "mlp.fc2.weight": whole["mlp.fc2.weight"][kept, 2:],
        "norm1.weight": whole["norm1.weight"][kept] * 0.5,
        "text_model.embeddings.word.weight": theirs["text_model.embeddings.word.weight"][:, kept],
        "text_projection.weight": theirs["text_projection.weight"][:, kept],
    }
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        assert torch.equal(found[name], own), name


def test_the_student_owns_its_weights() -> None:
    teacher, student = _Tower(4, 2), _Tower(4, 2)
    inherit(student.state_dict(), teacher.state_dict())
    before = teacher.embedding.weight.clone()
    with torch.no_grad():
        student.embedding.weight.zero_()
    assert torch.equal(teacher.embedding.weight, before)


def test_a_wider_student_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embedding.weight: the student wants \(9, 3\), the tea"):
        inherit(_Tower(9, 2).state_dict(), _Tower(8, 2).state_dict())


def test_a_deeper_student_is_refused() -> None:
    with pytest.raises(ConfigError, match="student of 3 layers cannot inherit from a teacher of 2"):
        inherit(_Tower(8, 3).state_dict(), _Tower(8, 2).state_dict())


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the teacher has no weight head\.weight"):
        inherit(_Tower(4, 2, extra=True).state_dict(), _Tower(4, 2).state_dict())
