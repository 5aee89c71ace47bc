"""Quantization-aware training: fine-tune a student with the rounding of its int8 graph."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.compress.train.batch_losses import embed_batch
from edgeclip.compress.train.distill import switch_off_dropout
from edgeclip.compress.train.distillation_batches import DistillationBatches
from edgeclip.compress.train.loss_terms import feature_loss
from edgeclip.compress.train.train_loop import Rows, TrainSettings, TrainTask, train
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.spec import Tower


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGrid:
    """The quantization grid of a product's input: `scale * (n - zero)`, lowest <= n <= highest.

    Raises:
        ValueError: a scale that is not positive, or a zero that is not one of the integers.
    """

    scale: float
    zero: int
    lowest: int
    highest: int

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not self.lowest <= self.zero <= self.highest:
            raise ValueError(f"zero must be from {self.lowest} to {self.highest}, got {self.zero}")

    def round(self, values: Tensor) -> Tensor:
        """Round values of any shape to the grid, and clip them to its range; ties go to even."""
        rounded: Tensor = torch.fake_quantize_per_tensor_affine(
            values.float(), self.scale, self.zero, self.lowest, self.highest
        )
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrid:
    """The quantization grid of a weight: `step * n`, -largest <= n <= largest.

    Attributes:
        largest: 127, or 64 where weights take 7 bits.
        per_channel: each output channel has a step of its own.

    Raises:
        ValueError: fewer than two levels.
    """

    largest: int = 127
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"largest must be 1 or more, got {self.largest}")

    def round(self, weight: Tensor) -> Tensor:
        """Round a float32 weight [outputs, ...]; the largest absolute value sets the step."""
        with torch.no_grad():
            sizes = weight.abs().flatten(1).amax(dim=1)
            if not self.per_channel:
                sizes = sizes.amax().expand(len(weight))
            steps = torch.where(sizes > 0, sizes / self.largest, 1.0)
            zeros = torch.zeros_like(steps, dtype=torch.int32)
        rounded: Tensor = torch.fake_quantize_per_channel_affine(
            weight, steps, zeros, 0, -self.largest, self.largest
        )
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductGrid:
    """The quantization grids of a product's input and weight."""

    input: InputGrid
    weight: WeightGrid = WeightGrid()


# Names of the `nn.Linear` and `nn.Conv2d` of a model that are quantized.
ProductGrids = Mapping[str, ProductGrid]


@contextmanager
def fake_quantized(model: nn.Module, grids: ProductGrids) -> Iterator[None]:
    """Make a model round like its quantized graph, while the block lasts.

    Its modules, parameters and their names stay the same, so checkpoints are those of the
    float model. Modules that share its parts, such as a tower for export, see it too.
    Autocast must be off: bfloat16 has no more digits than int8.

    Raises:
        ConfigError: a name that is no product of the model.
    """
    products = {name: _product(model, name) for name in grids}
    try:
        for name, product in products.items():
            vars(product)["forward"] = partial(_rounded_forward, product, grids[name])
        yield
    finally:
        for product in products.values():
            vars(product).pop("forward", None)  # the class's own is seen again


def _product(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    found = dict(model.named_modules()).get(name)
    if isinstance(found, nn.Linear | nn.Conv2d):
        return found
    raise ConfigError(f"the model has no linear layer or convolution {name!r} to quantize")


def _rounded_forward(product: nn.Linear | nn.Conv2d, grid: ProductGrid, values: Tensor) -> Tensor:
    rounded, weight = grid.input.round(values), grid.weight.round(product.weight)
    if isinstance(product, nn.Linear):
        return nn.functional.linear(rounded, weight, product.bias)
    result: Tensor = product._conv_forward(rounded, weight, product.bias)  # pads as it is told
    return result


# The rows of a batch that a tower can learn from.
_WHICH: dict[Tower, str] = {"image": "readable", "text": "captioned"}
_DIGITS = 6  # of a scale, in the identity of a run


def finetune_settings(steps: int, *, batch_size: int = 64, seed: int = 0) -> TrainSettings:
    """Return settings to fine-tune a trained model: a small learning rate, no weight decay."""
    return TrainSettings(
        steps=steps,
        batch_size=batch_size,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup_steps=steps // 10,
        seed=seed,
        compute="fp32",
    )


def fine_tune(
    student: DualEncoder,
    cache: TeacherCache,
    source: Source,
    *,
    grids: ProductGrids,
    settings: TrainSettings,
    out: Path,
) -> None:
    """Train a student in place so that its int8 embeddings match cached ones; compute is float32.

    Only towers with products in `grids` are trained. Checkpoints and `log.jsonl` go to `out`; a
    run that was stopped goes on from there, if it is given the same student again.

    Raises:
        ConfigError: the cache belongs to other data or another space, there are no products to
            round, or `out` holds another run.
        KeyboardInterrupt: Ctrl-C, after the step in hand was saved.
    """
    towers = quantized_towers(student, grids)
    _check(student, cache, source, towers)

    def losses(found: Rows, targets: Rows) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {
            tower: feature_loss(found[tower][rows], targets[f"{tower} 0"][rows])
            for tower in towers
            if (rows := targets[_WHICH[tower]]).any()
        }
        if not parts:
            raise InputError("no picture of a whole batch can be read any more")
        return {"total": torch.stack([*parts.values()]).mean(), **parts}

    sampling = Sampling(parts_of(source), seed=settings.seed, held_out=0)
    task = TrainTask(
        title="fine-tune",
        module=student,
        batch=DistillationBatches(student, [cache], source, sampling, settings),
        embed=partial(embed_batch, student),
        losses=losses,
        identity=_identity(student, cache, grids),
    )
    switch_off_dropout(student)
    with fake_quantized(student, grids), _only(student, towers):
        train(task, settings, out)


def quantized_towers(student: DualEncoder, grids: ProductGrids) -> tuple[Tower, ...]:
    """Return the towers that have quantized products."""
    return tuple(
        tower
        for tower in _WHICH
        if any(name.startswith(student.tower_parts(tower)) for name in grids)
    )


def _check(
    student: DualEncoder, cache: TeacherCache, source: Source, towers: tuple[Tower, ...]
) -> None:
    """Check that the student, the cache and the data belong together.

    Raises:
        ConfigError: they do not; the message says which.
    """
    if not towers:
        raise ConfigError("there is nothing to fine-tune: no product of a tower is quantized")
    if cache.settings.source != source.identity:
        raise ConfigError(f"the cached embeddings are of other data than {source.name}")
    if cache.settings.dim != student.spec.dim:
        raise ConfigError(
            f"the cached embeddings have {cache.settings.dim} numbers, those of the student "
            f"{student.spec.dim}: they must share one space"
        )
    if "text" in towers and not cache.settings.captions:
        raise ConfigError(f"{source.name}: fine-tuning the text tower needs captions")


@contextmanager
def _only(student: DualEncoder, towers: tuple[Tower, ...]) -> Iterator[None]:
    """Freeze all weights except those of some towers, while the block lasts."""
    before = [(weight, weight.requires_grad) for weight in student.parameters()]
    chosen = tuple(part for tower in towers for part in student.tower_parts(tower))
    for name, weight in student.named_parameters():
        weight.requires_grad_(name.startswith(chosen))
    try:
        yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)


def _identity(student: DualEncoder, cache: TeacherCache, grids: ProductGrids) -> str:
    """Return the identity of a run; scales that differ only in their last digits count as equal."""
    plain = {name: asdict(grid) for name, grid in grids.items()}
    for grid in plain.values():
        grid["input"]["scale"] = f"{grid['input']['scale']:.{_DIGITS}g}"
    parts = (space_fingerprint(student), asdict(cache.settings), plain)
    return "quantization-aware " + json.dumps(parts, sort_keys=True)
