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
    heads_of,
    read_groups,
    teacher_name,
)
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.spec import Tower

_log = logging.getLogger(__name__)

_INPUTS = 256  # pictures, and as many texts
_BATCH = 4  # each gives one draw of v: 64 draws
_FORWARD = 64  # inputs of a batch without gradients
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
    used. Without captions the text tower has none.

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
        units |= _unit_importance(teacher, tower, rows_of, seed)
        layers |= _layer_importance(teacher, tower, rows_of)
        energies |= _energies(teacher, tower, rows_of)
    return Importance(units=units, layers=layers, energies=energies)


def _read(
    teacher: DualEncoder, source: Source, rows: NDArray[np.int64]
) -> tuple[Tensor, list[str]]:
    """Return pixels float32 [N, 3, size, size], and the first caption of each that has one."""
    pixels, captions = [], []
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
    config = getattr(teacher.model.config, "vision_config" if tower == "image" else "text_config")
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
                if group == heads_of(group.removesuffix(" heads")):
                    own = own.unflatten(0, (config.num_attention_heads, -1)).sum(dim=1)
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
    batches = given.split(_FORWARD)
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        whole = [_embed(teacher, tower, batch) for batch in batches]
        for prefix, count in counts.items():
            scores = torch.zeros(count, dtype=torch.float64)
            for number in _bar(range(count), f"layers of the {tower} tower"):
                with _skipped(teacher.model.get_submodule(f"{prefix}{number}")):
                    cosines = [
                        (_embed(teacher, tower, batch) * own).sum(dim=-1)
                        for batch, own in zip(batches, whole, strict=True)
                    ]
                scores[number] = 1 - float(torch.cat(cosines).mean())
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
    for name, module in teacher.model.named_modules():
        if isinstance(module, nn.LayerNorm) and name.startswith(prefixes):

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
        ConfigError: a tower with weights of unknown units.
    """
    layers = {
        prefix: _largest(importance.layers[prefix], count)
        for prefix, count in count_layers(student).items()
        if prefix in importance.layers
    }
    units: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for name, weight in student.items():
        origin = teacher_name(name, layers)
        joint = 3 if "in_proj" in name or "qkv" in name else 1
        groups = axis_groups(origin, source[origin].shape, weight.shape)
        for axis, group in enumerate(groups):
            if group is None or group in units:
                continue
            parts = joint if axis == 0 else 1
            have, want = source[origin].shape[axis] // parts, weight.shape[axis] // parts
            units[group] = _kept(importance, group, have, want, origin)
    for name, weight in student.items():
        module = teacher_name(name, layers).rpartition(".")[0]
        if module in importance.energies and len(weight) < len(importance.energies[module]):
            kept = units[
                axis_groups(f"{module}.weight", source[f"{module}.weight"].shape, weight.shape)[0]
            ]
            scales[module] = float(importance.energies[module][kept].mean().sqrt())
    return Choice(units=units, layers=layers, scales=scales)


def _kept(importance: Importance, group: str, have: int, want: int, name: str) -> Tensor:
    """Return the places of the most important units of a group, `want` of `have`."""
    scores = importance.units.get(group)
    if scores is None or have % len(scores) or want % (have // len(scores)):
        raise ConfigError(
            f"the teacher's {name} has units of an unknown kind, so that none can be chosen by "
            "importance: choose --inherit leading"
        )
    size = have // len(scores)
    chosen = torch.tensor(_largest(scores, want // size))
    return (chosen[:, None] * size + torch.arange(size)).flatten()


def _largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the places of the `count` largest, ascending; of equals the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
