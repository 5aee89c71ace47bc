"""Make every weight of a student a learned linear map of its teacher's: W_s = A_out W A_in^T.

CLIP-Map (arXiv 2602.05909): the map of a whole weight is the Kronecker product of A_in and A_out,
which begin as a selection of rows and columns ("diagonal"), so that the student begins as the one
that is selected. The layers are mixed first: W is a learned combination of the teacher's layers,
which begins as one of them. The teacher's weights stay as they are; only the maps are trained.

TIES
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgeclip.compress.students.inherit import (
    Choice,
    axis_groups,
    is_joint,
    layer_of,
    norm_scale,
    teacher_name,
)


@dataclass(frozen=True, slots=True)
class AxisMap:
    """A map of one axis of a weight; `parts` of it, one behind the other, are mapped alike."""

    axis: int
    parts: int
    matrix: nn.Parameter

    def __call__(self, weight: Tensor) -> Tensor:
        """Map float32 [.., parts * have, ..] to [.., parts * want, ..]."""
        split = weight.unflatten(self.axis, (self.parts, -1)).movedim(self.axis + 1, -1)
        mapped = split @ self.matrix.T
        return mapped.movedim(-1, self.axis + 1).flatten(self.axis, self.axis + 1)


class MappedWeight(nn.Module):
    """Computes a student's weight in place of its own: a parametrization of torch.

    Args:
        layers: the teacher's weights that are mixed, float32 [count, ...].
        mix: their factors, float32 [count]; None where there is one.
        maps: of the axes that are smaller in the student.
        scale: a constant factor.
    """

    def __init__(
        self,
        layers: Tensor,
        mix: nn.Parameter | None,
        maps: tuple[AxisMap, ...],
        scale: float,
    ) -> None:
        super().__init__()
        # In a tuple, so that torch neither lists nor saves them here: weights share the maps.
        self._held = (layers, mix, maps, scale)

    def forward(self, _own: Tensor) -> Tensor:
        """Return the weight, float32; the student's own is not used."""
        layers, mix, maps, scale = self._held
        with torch.autocast(layers.device.type, enabled=False):
            weight = layers[0] if mix is None else torch.tensordot(mix, layers, dims=1)
            for own in maps:
                weight = own(weight)
            return weight * scale


@contextmanager
def mapped(
    student: nn.Module,
    weights: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    choice: Choice,
    *,
    tie="stream",
) -> Iterator[int]:
    """Train maps in place of a student's weights while the block lasts; then fold them.

    Yields the number of maps that can be trained: parameters of `student`, in its module `maps`.
    Without any it is left as it is. When the block ends without an error, the student is of plain
    weights again, with the values that the maps gave them.

    Args:
        student: has the weights in its module `model`.
        weights: those that are mapped, by their names there.
        source: the teacher's weights.
        choice: what the maps begin with.
    """
    made = _Maps(source, choice, tie)
    places = [(name, made.of(name, weight)) for name, weight in weights.items()]
    model = student.get_submodule("model")
    asked = {name: own.requires_grad for name, own in model.named_parameters()}
    found = [(name, own) for name, own in places if own is not None]
    if not found:
        yield 0
        return
    for name in weights:
        if name in asked:
            model.get_parameter(name).requires_grad_(False)
    for name, own in found:
        module, _, kind = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(module), kind, own, unsafe=True)
    student.add_module("maps", nn.ParameterList(made.trained))
    yield len(made.trained)
    for name, _ in found:
        module, _, kind = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(module), kind)
    del student.maps
    for name, was in asked.items():
        model.get_parameter(name).requires_grad_(was)


class _Maps:
    """Makes the maps, and gives the weights that share one the same."""

    def __init__(self, source: Mapping[str, Tensor], choice: Choice, tie) -> None:
        self._source, self._choice, self._tie = source, choice, tie
        self._matrices: dict[str, nn.Parameter] = {}
        self._stacks: dict[str, Tensor] = {}
        self.trained: list[nn.Parameter] = []

    def of(self, name: str, weight: Tensor) -> MappedWeight | None:
        """Return the map of a weight; None where it is the teacher's whole."""
        origin = teacher_name(name, self._choice.layers)
        layers, mix = self._layers(name, origin)
        maps = []
        groups = axis_groups(origin, self._source[origin].shape, weight.shape)
        for axis, group in enumerate(groups):
            if group is not None:
                parts = 3 if axis == 0 and is_joint(origin) else 1
                maps.append(
                    AxisMap(
                        axis,
                        parts,
                        self._matrix(
                            origin, axis, weight.ndim, group, layers.shape[axis + 1] // parts
                        ),
                    )
                )
        if mix is None and not maps:
            return None
        return MappedWeight(layers, mix, tuple(maps), norm_scale(origin, self._choice))

    def _layers(self, name: str, origin: str) -> tuple[Tensor, nn.Parameter | None]:
        """Return the teacher's weights of all layers, and their factors, if they are to be mixed."""
        found = layer_of(origin)
        if found is None:
            return self._source[origin][None], None
        prefix, kept, rest = found
        every = [
            own
            for own in self._source
            if (own_layer := layer_of(own)) and own_layer[0] == prefix and own_layer[2] == rest
        ]
        if len(every) == len(self._choice.layers[prefix]):
            return self._source[origin][None], None
        key = f"{prefix}{rest}"
        if key not in self._stacks:
            self._stacks[key] = torch.stack(
                [
                    self._source[f"{prefix}{n}.{rest}" if False else f"{prefix}{n}{rest}"]
                    for n in range(len(every))
                ]
            )
        mix = torch.zeros(len(every), device=self._source[origin].device)
        mix[kept] = 1
        parameter = nn.Parameter(mix)
        self.trained.append(parameter)
        return self._stacks[key], parameter

    def _matrix(self, origin: str, axis: int, ndim: int, group: str, have: int) -> nn.Parameter:
        side = "in" if axis == 1 and ndim == 2 and "embed" not in origin else "out"
        if self._tie == "stream":
            key = f"{group} {side}"
        elif self._tie == "one":
            key = group
        else:
            key = f"{origin.rpartition('.')[0]} {side}"
        if key not in self._matrices:
            kept = self._choice.units[group].to(self._source[origin].device)
            start = torch.zeros(len(kept), have, device=kept.device)
            start[torch.arange(len(kept)), kept] = 1
            self._matrices[key] = nn.Parameter(start)
            self.trained.append(self._matrices[key])
        return self._matrices[key]
