"""Measure what the units and layers of a teacher matter to its embeddings, and choose by it.

A unit matters as much as the embeddings change without it, to the first order: the mean over some
pictures (or texts) of |de/dm|^2, for a factor m on all that reads the unit. With v ~ N(0, I) drawn
for every input, E[(d(sum v.e)/dm)^2] is the sum of |de/dm|^2 over the inputs (Hutchinson 1989), and
d/dm is the sum of w dL/dw over the weights w that read the unit: the first-order Taylor criterion
(Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019) with the Fisher
information in place of a loss, whose gradient is 0 at the teacher itself. It needs no name of a
module but those of the weights, so that it serves every family.

A layer matters as much as the embeddings turn where it is skipped: block influence (Men et al.,
"ShortGPT", arXiv 2403.03853), measured at the end of the tower.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import Source
from edgeclip.compress.processes import processes
from edgeclip.compress.students.inherit import (
    Choice,
    axis_groups,
    count_layers,
    even_layers,
    is_joint,
    read_groups,
    teacher_name,
    teacher_weight,
)
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.spec import Tower

_log = logging.getLogger(__name__)

_INPUTS = 256  # pictures, and as many texts
_BATCH = 4  # each gives one draw of v: 64 draws
_FORWARD = 64  # inputs of a batch without gradients, and all that layers are measured on
TOWERS: tuple[Tower, ...] = ("image", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """What the units and layers of a teacher matter to its embeddings.

    Attributes:
        units: of every unit by the name of its group, float64 [count]; those of attention are
            whole heads.
        layers: of every layer, float64 [count], by the prefix of the layers' names.
        energies: of every channel that a norm reads, its mean square behind the division by the
            standard deviation, float64 [width], by the name of the norm. Their mean is 1.
    """

    units: Mapping[str, Tensor]
    layers: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]


def measure_importance(
    teacher: DualEncoder,
    source: Source,
    *,
    seed: int = 0,
    held_out: int | None = None,
    inputs: int = _INPUTS,
) -> Importance:
    """Measure the importance of a teacher's units and layers on some pictures and their captions.

    It is a function of the teacher, the source and the seed. Pictures held out of training are not
    used. A text tower has none without captions, and a convolutional tower has none at all.

    Args:
        teacher: is left as it is.
        source: the training data.
        seed: of the choice of pictures, and of the directions that are drawn.
        held_out: as in `distill`.
        inputs: number of pictures; fewer if there are not as many.

    Raises:
        InputError: no picture can be read.
    """
    team = processes()
    found = None
    if team.is_first:
        found = _measure(teacher, source, seed=seed, held_out=held_out, inputs=inputs)
    made = team.from_first(found)
    assert made is not None
    return made


_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers")


def is_plain_transformer(config: Any) -> bool:
    """Tell whether all layers of a tower with this config have one width and number of heads."""
    return all(isinstance(getattr(config, name, None), int) for name in _SIZES)


def _measure(
    teacher: DualEncoder, source: Source, *, seed: int, held_out: int | None, inputs: int
) -> Importance:
    sampling = Sampling(parts_of(source), seed=seed, held_out=held_out)
    rows, _ = sampling.items(0, min(inputs, sampling.train_count))
    given: dict[Tower, Tensor] = {}
    pixels, captions = _read(teacher, source, rows)
    given["image"] = pixels
    if captions:
        given["text"] = teacher.tokenize(captions)
    units: dict[str, Tensor] = {}
    layers: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    for tower, rows_of in given.items():
        if not is_plain_transformer(_config_of(teacher, tower)):
            continue  # nothing smaller inherits from it
        units |= _unit_importance(teacher, tower, rows_of, seed)
        layers |= _layer_importance(teacher, tower, rows_of[:_FORWARD])
        energies |= _energies(teacher, tower, rows_of)
    return Importance(units=units, layers=layers, energies=energies)


def _read(
    teacher: DualEncoder, source: Source, rows: NDArray[np.int64]
) -> tuple[Tensor, list[str]]:
    """Return pixels float32 [N, 3, size, size], and the first caption of each that has one."""
    pixels: list[Tensor] = []
    captions: list[str] = []
    for index in rows.tolist():
        try:
            pixels.append(teacher.preprocess([source[index].image]))
        except InputError as error:
            _log.warning("left out of measuring the teacher's importance: %s", error)
            continue
        captions += source.captions(index)[:1]
    if not pixels:
        raise InputError(f"none of {len(rows)} pictures of {source.name} can be read")
    return torch.cat(pixels), captions


def _embed(teacher: DualEncoder, tower: Tower, given: Tensor) -> Tensor:
    return teacher.embed_image(given) if tower == "image" else teacher.embed_text(given)


def _unit_importance(
    teacher: DualEncoder, tower: Tower, given: Tensor, seed: int
) -> dict[str, Tensor]:
    weights = _reading_weights(teacher, tower)
    heads = _config_of(teacher, tower).num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    with _asking_for_gradients(weights.values()):
        for batch in _bar(given.split(_BATCH), f"importance of the {tower} tower"):
            embeddings = _embed(teacher, tower, batch)
            drawn = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
            gradients = torch.autograd.grad((drawn * embeddings).sum(), list(weights.values()))
            change: dict[str, Tensor] = {}
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                group = read_groups(name)
                assert group is not None
                own = (weight.detach() * gradient).double().sum(dim=0)
                if group.endswith(" heads"):
                    own = own.unflatten(0, (heads, -1)).sum(dim=1)
                change[group] = change.get(group, torch.zeros_like(own)) + own
            for group, own in change.items():
                totals[group] = totals.get(group, torch.zeros_like(own)) + own**2
    return {group: total.cpu() / len(given) for group, total in totals.items()}


def _reading_weights(teacher: DualEncoder, tower: Tower) -> dict[str, nn.Parameter]:
    """Return the weights [out, in] of a tower that read units, by their names in the model."""
    prefixes = tuple(f"{name}." for name in teacher.family.tower_names(tower))
    width = _config_of(teacher, tower).hidden_size
    found = {}
    for name, weight in teacher.model.named_parameters():
        module = teacher.model.get_submodule(name.rpartition(".")[0])
        is_product = isinstance(module, nn.Linear | nn.MultiheadAttention) and weight.ndim == 2
        group = read_groups(name)
        is_stream = group in ("vision_model", "text_model")
        if is_product and name.startswith(prefixes) and (not is_stream or weight.shape[1] == width):
            found[name] = weight
    return found


def _config_of(teacher: DualEncoder, tower: Tower) -> Any:
    config: Any = teacher.model.config
    return config.vision_config if tower == "image" else config.text_config


@contextmanager
def _asking_for_gradients(weights: Any) -> Iterator[None]:
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, was in before:
            weight.requires_grad_(was)


def _layer_importance(teacher: DualEncoder, tower: Tower, given: Tensor) -> dict[str, Tensor]:
    """Return 1 - cos of the embeddings with and without each layer, averaged over the inputs."""
    prefixes = tuple(f"{name}." for name in teacher.family.tower_names(tower))
    counts = {
        prefix: count
        for prefix, count in count_layers(teacher.model.state_dict()).items()
        if prefix.startswith(prefixes)
    }
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        whole = _embed(teacher, tower, given)
        for prefix, count in counts.items():
            scores = torch.zeros(count, dtype=torch.float64)
            for number in _bar(range(count), f"layers of the {tower} tower"):
                with _skipped(teacher.model.get_submodule(f"{prefix}{number}")):
                    cosines = (_embed(teacher, tower, given) * whole).sum(dim=-1)
                scores[number] = 1 - float(cosines.mean())
            found[prefix] = scores
    return found


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """Let a layer return what it is given while the block lasts."""

    def hook(_: nn.Module, args: Any, named: Any, output: Any) -> Any:
        given = args[0] if args else named["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _energies(teacher: DualEncoder, tower: Tower, given: Tensor) -> dict[str, Tensor]:
    prefixes = tuple(f"{name}." for name in teacher.family.tower_names(tower))
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    stream = (_config_of(teacher, tower).hidden_size,)
    for name, module in teacher.model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) and module.normalized_shape == stream
        if is_norm and name.startswith(prefixes):

            def hook(own: nn.Module, args: Any, _output: Any, name: str = name) -> None:
                assert isinstance(own, nn.LayerNorm)
                plain = nn.functional.layer_norm(args[0], own.normalized_shape, eps=own.eps)
                squares = plain.double().flatten(0, -2).square()
                sums[name] = sums.get(name, torch.zeros_like(squares[0])) + squares.sum(dim=0)
                counts[name] = counts.get(name, 0) + len(squares)

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.inference_mode():
            for batch in given.split(_FORWARD):
                _embed(teacher, tower, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() / counts[name] for name, total in sums.items()}


def _bar(items: Sequence[Any] | range, title: str) -> Any:
    return tqdm(items, desc=title, leave=False, dynamic_ncols=True)


def choose(
    importance: Importance, student: Mapping[str, Tensor], source: Mapping[str, Tensor]
) -> Choice:
    """Choose the units and layers of a teacher that matter most, as many as the student has.

    Args:
        importance: of the teacher's.
        student: weights of a student, by name.
        source: the teacher's weights, by name.

    Raises:
        ConfigError: a tower with weights of unknown units, or a student that is larger.
    """
    layers = {
        prefix: _largest(importance.layers[prefix], len(even))
        if prefix in importance.layers
        else even
        for prefix, even in even_layers(student, source).items()
    }
    units: dict[str, Tensor] = {}
    for name, weight in student.items():
        origin = teacher_name(name, layers)
        theirs = teacher_weight(source, origin, weight.shape).shape
        for axis, group in enumerate(axis_groups(origin, theirs, weight.shape)):
            if group is None:
                continue
            parts = 3 if axis == 0 and is_joint(origin) else 1
            have, want = theirs[axis] // parts, weight.shape[axis] // parts
            scores = importance.units.get(group, _NOTHING)
            size = have // max(1, len(scores))  # places of a unit; a head has several
            if group not in units:
                kept = torch.tensor(_largest(scores, want // max(1, size)), dtype=torch.int64)
                units[group] = (kept[:, None] * size + torch.arange(size)).flatten()
            if len(units[group]) != want or (size > 1 and not group.endswith(" heads")):
                raise ConfigError(
                    f"the teacher's {origin} has units of an unknown kind, so that none can be "
                    "chosen by importance: choose --inherit leading"
                )
    return Choice(units=units, layers=layers, scales=_norm_scales(importance.energies, units))


def _norm_scales(energies: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what makes a norm over the kept channels give what it gave over all, on average."""
    scales = {}
    for norm, energy in energies.items():
        kept = units.get(norm.split(".", 1)[0])
        if kept is not None:
            scales[norm] = float(energy[kept].mean().sqrt())
    return scales


_NOTHING = torch.empty(0)


def _largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the places of the `count` largest, ascending; of equals the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
