"""Fill a student with a part of its teacher's weights: which units, and which layers.

The units of a tower are the channels of its residual stream, the heads of each attention and the
neurons of each MLP. An axis of a weight runs over the units of one group. The stream is one group
for a whole tower: embeddings, all layers, norms and projection keep the same channels. Heads and
neurons are a group of each layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edgeclip.runtime.errors import ConfigError

Inherit = Literal["leading", "selected", "mapped", "random"]

_JOINT = re.compile(r"in_proj_|qkv", re.IGNORECASE)  # query, key and value in one
# The number of a layer in the name of a weight: encoder.layers.3.mlp, encoder.layer.3, layers.3.
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_ATTENTION = r"(.+)\.(?:self_attn|attention|attn)\."
_INTO_HEADS = re.compile(_ATTENTION + r"(?:self\.)?(?:[qkv]_proj|query|key|value|in_proj_|qkv)")
_OUT_OF_HEADS = re.compile(_ATTENTION + r"(?:out_proj|o_proj|output\.dense)\.")
_INTO_NEURONS = re.compile(r"(.+)\.(?:mlp\.fc1|intermediate\.dense)\.")
_OUT_OF_NEURONS = re.compile(r"(.+)\.(?:mlp\.fc2|output\.dense)\.")
_STREAMS = {
    "vision_model": "vision_model",
    "visual_projection": "vision_model",
    "text_model": "text_model",
    "text_projection": "text_model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The units and layers of a teacher that a student keeps.

    Attributes:
        units: by group, the places of the kept ones on an axis, int64, ascending. A head has as
            many places as channels.
        layers: the kept layers of each encoder, ascending, by the prefix of their names.
        scales: factors of the weights of norms, by the name of their module: a norm over fewer
            channels divides by another standard deviation.
    """

    units: Mapping[str, Tensor]
    layers: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float] = field(default_factory=dict)


def even_stride(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Return the teacher layers that the student keeps: evenly spread, starting with the first.

    Raises:
        ConfigError: more layers than the teacher has, or none.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ConfigError(
            f"a student of {student_layers} layers cannot inherit from a teacher of "
            f"{teacher_layers}: choose 1 to {teacher_layers}"
        )
    return tuple(round(i * teacher_layers / student_layers) for i in range(student_layers))


def inherit(
    student: Mapping[str, Tensor], source: Mapping[str, Tensor], choice: Choice | None = None
) -> None:
    """Fill every weight of `student` with a part of the teacher's weight of that name, in place.

    The student may be narrower and shallower than the teacher. Without a `choice` it gets the
    leading part of every weight, and the layers at an even stride.

    Args:
        student: its weights by name, as `state_dict` gives them.
        source: the teacher's.
        choice: what to keep.

    Raises:
        ConfigError: the teacher lacks a weight, or has a smaller one.
    """
    layers = even_layers(student, source) if choice is None else choice.layers
    with torch.no_grad():
        for name, target in student.items():
            origin = teacher_name(name, layers)
            weight = teacher_weight(source, origin, target.shape)
            kept = _leading(weight, target.shape, origin)
            if choice is not None:
                kept = _chosen(weight, target.shape, origin, choice)
            target.copy_(kept)


def teacher_weight(source: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Return the teacher's weight that a student's weight of some shape comes from.

    Raises:
        ConfigError: there is none, or one that is smaller.
    """
    if name not in source:
        raise ConfigError(f"the teacher has no weight {name} to inherit")
    weight = source[name]
    if weight.ndim != len(shape) or any(
        have < want for have, want in zip(weight.shape, shape, strict=True)
    ):
        raise ConfigError(
            f"{name}: the student wants {tuple(shape)}, the teacher has {tuple(weight.shape)}; "
            f"a student can only be smaller"
        )
    return weight


def _leading(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    if is_joint(name) and weight.shape[0] % 3 == shape[0] % 3 == 0:
        parts = weight.unflatten(0, (3, -1))[:, : shape[0] // 3]
        weight = parts.flatten(0, 1)
    return weight[tuple(slice(0, size) for size in shape)]


def _chosen(weight: Tensor, shape: torch.Size, name: str, choice: Choice) -> Tensor:
    for axis, group in enumerate(axis_groups(name, weight.shape, shape)):
        if group is None:
            continue
        kept = choice.units[group].to(weight.device)
        if axis == 0 and is_joint(name):
            weight = weight.unflatten(0, (3, -1))[:, kept].flatten(0, 1)
        else:
            weight = weight.index_select(axis, kept)
    return weight * norm_scale(name, choice)


def norm_scale(name: str, choice: Choice) -> float:
    """Return the factor of a weight of the teacher's: 1 but for the weights of norms."""
    module, _, kind = name.rpartition(".")
    return choice.scales.get(module, 1.0) if kind == "weight" else 1.0


def is_joint(name: str) -> bool:
    """Tell whether a weight holds those of query, key and value, one behind the other."""
    return _JOINT.search(name) is not None


def axis_groups(name: str, teacher: torch.Size, student: torch.Size) -> tuple[str | None, ...]:
    """Return the group of units that each axis of a weight runs over; None for one kept whole.

    Args:
        name: of the teacher's weight.
        teacher, student: its shape, and that of the student's weight.

    Raises:
        ConfigError: an axis of unknown units.
    """
    stream = _STREAMS.get(name.split(".", 1)[0])
    groups: list[str | None] = [stream] * len(teacher)
    if found := _INTO_HEADS.match(name):
        groups[0] = heads_of(found[1])
    elif found := _OUT_OF_HEADS.match(name):
        groups[1:] = [heads_of(found[1])] * (len(teacher) - 1)
    elif found := _INTO_NEURONS.match(name):
        groups[0] = neurons_of(found[1])
    elif found := _OUT_OF_NEURONS.match(name):
        groups[1:] = [neurons_of(found[1])] * (len(teacher) - 1)
    return tuple(
        None if have == want else group
        for have, want, group in zip(teacher, student, groups, strict=True)
    )


def heads_of(block: str) -> str:
    """Return the name of the group of a block's attention heads."""
    return f"{block} heads"


def neurons_of(block: str) -> str:
    """Return the name of the group of a block's neurons."""
    return f"{block} neurons"


def read_groups(name: str) -> str | None:
    """Return the group of units that a product reads, by the name of its weight [out, in].

    None if it is no part of a tower.
    """
    for pattern, group in ((_OUT_OF_HEADS, heads_of), (_OUT_OF_NEURONS, neurons_of)):
        if found := pattern.match(name):
            return group(found[1])
    return _STREAMS.get(name.split(".", 1)[0])


def even_layers(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the teacher's layers at an even stride, for each encoder by the prefix of its names.

    Raises:
        ConfigError: the student has more than the teacher.
    """
    counts = count_layers(teacher)
    return {
        prefix: even_stride(counts.get(prefix, 0), layers)
        for prefix, layers in count_layers(student).items()
    }


def count_layers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the layers of each encoder, by the prefix of their names."""
    counts: dict[str, int] = {}
    for name in state:
        if found := layer_of(name):
            prefix, number, _ = found
            counts[prefix] = max(counts.get(prefix, 0), number + 1)
    return counts


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Split the name of a weight at the number of its layer; None for one outside of layers."""
    found = _LAYER.search(name)
    return None if not found else (name[: found.start(1)], int(found[1]), name[found.end(1) :])


def teacher_name(name: str, layers: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of the teacher's weight that a student's weight comes from."""
    found = layer_of(name)
    if found is None:
        return name
    prefix, number, rest = found
    return f"{prefix}{layers[prefix][number]}{rest}"
