from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeclip.compress.students.student import even_stride, inherit
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
