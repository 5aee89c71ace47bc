"""Compute a student's weights from its teacher's by a linear map that is learned.

W_s = A_out W A_in^T, the Kronecker-factorised map of CLIP-Map (arXiv 2602.05909): vec(W_s) is
(A_in x A_out) vec(W). W is a mixture of the teacher's layers. All begin as a selection ("diagonal
inheritance"): A with one 1 in each row, the mixture with one factor of 1; so the student begins as
the selected one. Only A and the factors are trained, then folded into plain weights.

Weights share their maps as far as they share their units. The residual stream of a tower has two
for all its layers, one of what is written to it and one of what reads it, and so have the heads and
the neurons of each layer. A map of each weight alone would have more numbers than the weight.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from edgeclip.compress.students.inherit import (
    Choice,
    axis_groups,
    is_joint,
    layer_of,
    norm_scale,
    teacher_name,
    teacher_weight,
)

_Student = TypeVar("_Student", bound=nn.Module)


def with_maps(
    student: _Student, weights: Iterable[str], source: Mapping[str, Tensor], choice: Choice
) -> _Student | None:
    """Return a copy of a student whose weights are computed by maps; None if none is smaller.

    The maps are parameters of the copy, `maps`, and the weights are not trained; others are, as in
    the student.

    Args:
        student: holds the model in its module `model`; it is left as it is.
        weights: names in the model of those that are mapped.
        source: the teacher's, which stay as they are.
        choice: what the maps begin with.
    """
    made = copy.deepcopy(student)
    model = made.get_submodule("model")
    maps = _Maps(source, choice)
    own = dict(model.named_parameters())
    for name in weights:
        if name not in own:  # a number that is no weight
            continue
        own[name].requires_grad_(False)
        computed = maps.of(name, own[name].shape)
        if computed is not None:
            register_parametrization(*_place(model, name), computed, unsafe=True)  # other shapes
    made.add_module("maps", nn.ParameterList(maps.trained))
    return made if maps.trained else None


def fold(mapped: nn.Module, student: nn.Module) -> None:
    """Give a student, in place, the weights that a copy of it has by its maps."""
    theirs = mapped.get_submodule("model")
    with torch.no_grad():
        for name, weight in student.get_submodule("model").state_dict().items():
            module, kind = _place(theirs, name)
            weight.copy_(getattr(module, kind))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module of a parameter, and the name of it there."""
    module, _, kind = name.rpartition(".")
    return model.get_submodule(module), kind


@dataclass(frozen=True, slots=True)
class _AxisMap:
    """Maps an axis of a weight; it has `parts`, one behind the other, that are mapped alike."""

    axis: int
    parts: int
    matrix: nn.Parameter  # [student's, teacher's]

    def __call__(self, weight: Tensor) -> Tensor:
        split = weight.unflatten(self.axis, (self.parts, -1)).movedim(self.axis + 1, -1)
        made = (split @ self.matrix.T).movedim(-1, self.axis + 1)
        flat: Tensor = made.flatten(self.axis, self.axis + 1)
        return flat


class _MappedWeight(nn.Module):
    """A parametrization of torch that computes a weight from the teacher's.

    Args:
        layers: the teacher's weights that are mixed, float32 [count, ...].
        factors: of each, float32 [count]; None where there is one.
        maps: of the axes that are smaller in the student.
        scale: a constant factor.
    """

    def __init__(
        self,
        layers: Tensor,
        factors: nn.Parameter | None,
        maps: tuple[_AxisMap, ...],
        scale: float,
    ) -> None:
        super().__init__()
        # In a tuple torch neither lists nor saves them once for each weight that shares them.
        self._held = (layers, factors, maps, scale)

    def forward(self, _own: Tensor) -> Tensor:
        """Return the weight, float32; the copy's own is not used."""
        layers, factors, maps, scale = self._held
        with torch.autocast(layers.device.type, enabled=False):
            weight = layers[0] if factors is None else torch.tensordot(factors, layers, dims=1)
            for own in maps:
                weight = own(weight)
            return weight * scale


class _Maps:
    """Makes the maps of all weights; `trained` are their parameters, each once."""

    def __init__(self, source: Mapping[str, Tensor], choice: Choice) -> None:
        self._source, self._choice = source, choice
        self._matrices: dict[tuple[str, bool], nn.Parameter] = {}
        self._stacks: dict[tuple[str, str], Tensor] = {}
        self.trained: list[nn.Parameter] = []

    def of(self, name: str, shape: torch.Size) -> _MappedWeight | None:
        """Return the map of a student's weight; None if that is the teacher's whole."""
        origin = teacher_name(name, self._choice.layers)
        theirs = teacher_weight(self._source, origin, shape).shape
        layers, factors = self._mixture(origin)
        maps = []
        for axis, group in enumerate(axis_groups(origin, theirs, shape)):
            if group is not None:
                parts = 3 if axis == 0 and is_joint(origin) else 1
                reads = axis == 1 and len(shape) == 2 and ".embeddings." not in origin
                matrix = self._matrix(group, reads, theirs[axis] // parts)
                maps.append(_AxisMap(axis, parts, matrix))
        if factors is None and not maps:
            return None
        return _MappedWeight(layers, factors, tuple(maps), norm_scale(origin, self._choice))

    def _mixture(self, origin: str) -> tuple[Tensor, nn.Parameter | None]:
        """Return the teacher's weights of all layers and their factors, if the student has less."""
        found = layer_of(origin)
        if found is None:
            return self._source[origin][None], None
        prefix, kept, rest = found
        if (prefix, rest) not in self._stacks:
            every = [layer_of(name) for name in self._source]
            count = sum(own is not None and (own[0], own[2]) == (prefix, rest) for own in every)
            layers = [self._source[f"{prefix}{number}{rest}"] for number in range(count)]
            self._stacks[prefix, rest] = torch.stack(layers)
        stack = self._stacks[prefix, rest]
        if len(stack) == len(self._choice.layers[prefix]):
            return self._source[origin][None], None
        factors = torch.zeros(len(stack), device=stack.device)
        factors[kept] = 1
        return stack, self._parameter(factors)

    def _matrix(self, group: str, reads: bool, have: int) -> nn.Parameter:
        if (group, reads) not in self._matrices:
            kept = self._choice.units[group]
            start = torch.eye(have)[kept.cpu()].to(next(iter(self._source.values())).device)
            self._matrices[group, reads] = self._parameter(start)
        return self._matrices[group, reads]

    def _parameter(self, start: Tensor) -> nn.Parameter:
        self.trained.append(nn.Parameter(start))
        return self.trained[-1]
