"""Weight inheritance: a smaller transformer tower cut out of the teacher's own weights.

Uniform selection as in "Initializing Models with Larger Ones" (Xu et al. 2024): channels
and whole attention heads are taken first to last, layers by an even stride, and the size
of a head is kept, so that every kept head still attends as it did.
"""

import torch
from torch import Tensor, nn

from edgeclip.profiles.errors import ConfigError

_ENCODER_LAYERS = "encoder.layers."


def even_stride(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Which teacher layers to keep: evenly spread, the first always, at most all of them.

    Raises:
        ConfigError: more layers than the teacher has, or none.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ConfigError(
            f"a student of {student_layers} layers cannot inherit from a teacher of "
            f"{teacher_layers}: choose 1 to {teacher_layers}"
        )
    return tuple(round(i * teacher_layers / student_layers) for i in range(student_layers))


def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Fill every weight of `student` with the leading part of the teacher's of that name.

    Both are towers (or whole models) of one family; the student may be narrower and
    shallower. `encoder.layers.I` is filled from the teacher's layer at an even stride.

    Raises:
        ConfigError: a weight that the teacher does not have, or has smaller.
    """
    source = teacher.state_dict()
    layers = _layer_map(student.state_dict(), source)
    with torch.no_grad():
        for name, target in student.state_dict().items():
            origin = _renamed(name, layers)
            if origin not in source:
                raise ConfigError(f"the teacher has no weight {origin} to inherit")
            target.copy_(_leading(source[origin], target.shape, name))


def _leading(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    if weight.ndim != len(shape) or any(
        have < want for have, want in zip(weight.shape, shape, strict=True)
    ):
        raise ConfigError(
            f"{name}: the student wants {tuple(shape)}, the teacher has {tuple(weight.shape)}; "
            f"a student can only be smaller"
        )
    return weight[tuple(slice(0, size) for size in shape)]


def _layer_map(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, dict[int, int]]:
    """For each encoder (by the prefix of its name), student layer -> teacher layer."""
    counts = _count_layers(teacher)
    return {
        prefix: dict(enumerate(even_stride(counts.get(prefix, 0), layers)))
        for prefix, layers in _count_layers(student).items()
    }


def _count_layers(state: dict[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in state:
        prefix, found, rest = name.partition(_ENCODER_LAYERS)
        if found:
            counts[prefix] = max(counts.get(prefix, 0), int(rest.split(".")[0]) + 1)
    return counts


def _renamed(name: str, layers: dict[str, dict[int, int]]) -> str:
    prefix, found, rest = name.partition(_ENCODER_LAYERS)
    if not found:
        return name
    number, _, tail = rest.partition(".")
    return f"{prefix}{_ENCODER_LAYERS}{layers[prefix][int(number)]}.{tail}"
