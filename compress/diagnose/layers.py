"""What the layers of a tower compute: hidden states, attention, and what each is worth.

A layer is a module of a list (a transformer's layer, a block of a ConvNeXt) that gives as many
numbers as it takes, so that the tower can be run without it. Hidden states are averaged over the
positions of a picture, or over the tokens of a text without its padding, so that layers of towers
of any two kinds can be compared; those of at most `LAYER_ITEMS` items (measure.py) are kept.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.compress.diagnose.similarity import as_rows
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import Progress
from edgeclip.runtime.spec import Tower

_BATCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class TowerRun:
    """A tower of a model, and the inputs that its layers are looked at with.

    Attributes:
        model: the model, in evaluation mode.
        tower: which of its towers.
        inputs: pixels float32 [N, 3, size, size], or token ids int64 [N, length].
    """

    model: DualEncoder
    tower: Tower
    inputs: Tensor

    @property
    def module(self) -> nn.Module:
        """The tower, without its projection."""
        return self.model.get_submodule(self.model.tower_parts(self.tower)[0])

    def embed(self, inputs: Tensor) -> Tensor:
        """Embed a batch, float32 [N, dim], L2-normalised."""
        model = self.model
        return model.embed_image(inputs) if self.tower == "image" else model.embed_text(inputs)

    def batches(self) -> Iterator[Tensor]:
        """The inputs, a few at a time."""
        yield from self.inputs.split(_BATCH)

    def real(self, inputs: Tensor) -> Tensor | None:
        """Tell which tokens are no padding, bool [N, length]; None for pictures."""
        if self.tower == "image":
            return None
        spec = self.model.spec.text
        if spec.eos_id is None or spec.pad_to_context:
            return torch.ones_like(inputs, dtype=torch.bool)
        ends = (inputs == spec.eos_id).long()
        return ends.cumsum(dim=1) == ends  # up to the first end token, that included


def find_layers(run: TowerRun) -> tuple[nn.Module, ...]:
    """Return the layers of a tower in the order in which they are computed; () without any."""
    shapes: dict[str, bool] = {}
    tower = run.module
    listed = {
        f"{name}.{at}": child
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList)
        for at, child in enumerate(module)
    }

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            taken, given = _hidden_input(args, kwargs), _hidden(output)
            shapes[name] = taken is not None and given is not None and taken.shape == given.shape

        return hook

    with _hooked([(child, note(name)) for name, child in listed.items()]), torch.inference_mode():
        run.embed(run.inputs[:1])
    whole = [name for name, same in shapes.items() if same and _is_layer(listed[name])]
    inner = [name for name in whole if not any(other.startswith(f"{name}.") for other in whole)]
    return tuple(listed[name] for name in inner)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has several matrices, unlike a norm between two stages."""
    return sum(weight.dim() > 1 for weight in module.parameters()) > 1


def hidden_states(run: TowerRun, layers: Sequence[nn.Module]) -> list[Values]:
    """Return what each layer gives, averaged over positions: float64 [N, width] for each."""
    parts: list[list[Values]] = [[] for _ in layers]
    mask: Tensor | None = None

    def keep(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            parts[at].append(as_rows(_pooled(_hidden(output), mask).float().cpu().numpy()))

        return hook

    hooks = [(layer, keep(at)) for at, layer in enumerate(layers)]
    with _hooked(hooks), torch.inference_mode():
        for inputs in run.batches():
            mask = run.real(inputs)
            run.embed(inputs)
    return [np.concatenate(own) for own in parts]


def embed_without(run: TowerRun, skipped: Collection[nn.Module]) -> Values:
    """Embed the inputs with some layers left out, which then give what they take: [N, dim]."""

    def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        taken = _hidden_input(args, kwargs)
        return (taken, *output[1:]) if isinstance(output, tuple) else taken

    with _hooked([(layer, skip) for layer in skipped]), torch.inference_mode():
        return as_rows(
            torch.cat([run.embed(inputs) for inputs in run.batches()]).float().cpu().numpy()
        )


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """The attention of a tower.

    Attributes:
        entropy: of each layer and head, the mean entropy of where a position looks, divided by the
            logarithm of the positions that it may look at: 1 for everywhere alike, 0 for one place,
            float64 [layers, heads].
        maps: of the first pictures, how much the last layer's class token (without one: all
            positions) looks at each patch, mean of all heads: float64 [shown, rows, columns]; None
            for texts.
    """

    entropy: Values
    maps: Values | None


def attention(run: TowerRun, *, shown: int) -> Attention | None:
    """Measure the attention of a tower; None where it has none, or does not give it.

    Weights are read from what each attention module returns, which in transformers' written-out
    ("eager") attention is the softmax itself.
    """
    entropies: list[Tensor] = []
    latest: list[Tensor] = []  # one: a module may hand on what the one inside it gives
    real: Tensor | None = None

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) > 1 and _is_attention(output[1])):
            return
        if not latest or latest[0] is not output[1]:
            latest[:] = [output[1]]
            entropies.append(_entropy(output[1].detach().float(), real))

    total: Tensor | None = None
    first: Tensor | None = None
    modules = [(module, keep) for module in run.module.modules()]
    with _hooked(modules), torch.inference_mode():
        for inputs in run.batches():
            entropies.clear()
            real = run.real(inputs)
            run.embed(inputs)
            if not entropies or len({item.shape for item in entropies}) > 1:
                return None
            # A batch counts as its items.
            own = torch.stack(entropies).double() * len(inputs) / len(run.inputs)
            total = own if total is None else total + own
            first = latest[0][:shown].float() if first is None else first
            latest.clear()
    assert total is not None
    assert first is not None
    return Attention(as_rows(total.cpu().numpy()), None if run.tower == "text" else _maps(first))


def _is_attention(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == value.shape[3]


def _entropy(weights: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean normalised entropy of each head: [heads]; weights [N, heads, L, L]."""
    allowed = (weights > 0).sum(dim=-1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1)
    share = entropy / allowed.clamp_min(2).float().log()
    counted = (allowed > 1).float()
    if real is not None:
        counted = counted * real[:, None].float()
    return (share * counted).sum(dim=(0, 2)) / counted.sum(dim=(0, 2)).clamp_min(1)


def _maps(weights: Tensor) -> Values | None:
    """Return where a picture is looked at, [N, rows, columns]; None where patches are no square."""
    length = weights.shape[-1]
    side = math.isqrt(length)
    extra = length - side**2
    if side < 2 or extra > 8:
        return None
    looking = weights[:, :, 0] if extra else weights.mean(dim=2)
    found = looking.mean(dim=1)[:, extra:]
    found = found / found.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return as_rows(found.unflatten(1, (side, side)).cpu().numpy())


def without_each(
    run: TowerRun, layers: Sequence[nn.Module], target: Values, progress: Progress
) -> list[Values]:
    """Return the cosine to a target with each layer left out in turn: [N] for each layer.

    Args:
        run: the tower and its inputs.
        layers: those to leave out.
        target: embeddings to agree with, L2-normalised [N, dim].
        progress: told after each layer.
    """
    found = []
    for at, layer in enumerate(layers):
        found.append(np.einsum("nd,nd->n", embed_without(run, [layer]), target))
        progress(at + 1, len(layers))
    return found


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden_input(args: Any, kwargs: Any) -> Any:
    """Return the hidden states that a layer takes."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _hidden(output: Any) -> Any:
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) else None


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average hidden states over positions: [N, length, width] or [N, width, rows, columns]."""
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if hidden.dim() < 3:
        return hidden
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


_SMALLEST = 16  # rows and columns of a matrix that can be told from noise
_CLEARLY = 1.15  # of the edge of a random spectrum: no need to draw


def are_noise(layers: Sequence[nn.Module], *, seed: int = 0) -> list[bool]:
    """Tell which layers of a tower are noise among trained ones: see `is_noise`.

    Of a tower that was never trained no layer is: one of its layers may be missed, and the others
    would stand out.
    """
    trained = any(
        _largest(matrix) > _CLEARLY * _edge(matrix)
        for layer in layers
        for matrix in _matrices(layer)
    )
    return [trained and is_noise(layer, seed=seed) for layer in layers]


def is_noise(layer: nn.Module, *, seed: int = 0) -> bool:
    """Tell whether all matrices of a layer have the spectrum of their own entries in any order.

    Training makes some directions of a matrix larger than its entries alone can (Martin and
    Mahoney, JMLR 22, 2021). Entries in any order have their largest singular value at the edge of
    Marchenko and Pastur's law, s (sqrt(m) + sqrt(n)); a matrix is like noise if its own is no
    larger than that of one of 20 k - 1 permutations, with k matrices in the layer. Of a random
    layer each matrix is missed with 1 / (20 k), so any with 5% at most (Bonferroni); a trained one
    is hardly ever like noise. False for a layer without two matrices of 16 x 16 or more.
    """
    matrices = _matrices(layer)
    generator = torch.Generator().manual_seed(seed)
    permutations = 20 * len(matrices) - 1
    return len(matrices) > 1 and all(
        _is_noise(matrix, permutations, generator) for matrix in matrices
    )


def _matrices(layer: nn.Module) -> list[Tensor]:
    """Return the matrices of a layer that are large enough, each less its mean."""
    found = [
        weight.detach().float().flatten(1).cpu()
        for weight in layer.parameters()
        if weight.dim() > 1 and min(weight.flatten(1).shape) >= _SMALLEST
    ]
    return [matrix - matrix.mean() for matrix in found]


def _edge(centred: Tensor) -> float:
    """Return the largest singular value of random entries of the same spread."""
    rows, columns = centred.shape
    return float(centred.square().mean().sqrt()) * (math.sqrt(rows) + math.sqrt(columns))


def _is_noise(centred: Tensor, permutations: int, generator: torch.Generator) -> bool:
    largest = _largest(centred)
    if largest > _CLEARLY * _edge(centred):
        return False
    for _ in range(permutations):
        order = torch.randperm(centred.numel(), generator=generator)
        if largest <= _largest(centred.flatten()[order].view_as(centred)):
            return True
    return False


def _largest(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))
