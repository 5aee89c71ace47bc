"""A short fine-tune that makes int8 give what float gave: quantization-aware training.

The student learns with its products rounded as in the int8 graph (see `fake_quantize`), from
cached embeddings. Those are best the student's own in float, because the gates ask what int8
loses against them. What comes out is an ordinary float student whose weights round well.
In float it gives something else than before: only in int8 is it what it was trained to be.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from edgeclip.compress.compute import full_precision
from edgeclip.compress.distill import Batch, Batches
from edgeclip.compress.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.fake_quantize import ProductGrids, fake_quantized
from edgeclip.compress.losses import feature
from edgeclip.compress.sources import Source
from edgeclip.compress.teacher_cache import TeacherCache
from edgeclip.compress.train_loop import Task, TrainSettings, train
from edgeclip.profiles.errors import ConfigError
from edgeclip.runtime.spec import Tower

_PARTS: dict[Tower, tuple[str, ...]] = {
    "image": ("model.vision_model.", "model.visual_projection"),
    "text": ("model.text_model.", "model.text_projection"),
}
_DIGITS = 6  # of a scale, in what tells one run from another


def gentle_settings(steps: int, *, batch_size: int = 64, seed: int = 0) -> TrainSettings:
    """Return how to fine-tune what is trained already: slowly, and without decay of weights."""
    return TrainSettings(
        steps=steps,
        batch_size=batch_size,
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
    """Train `student` in place to embed in int8 as the cache says, always in float32.

    Only towers with products in `grids` are trained. Checkpoints and `log.jsonl` go to `out`; a
    run that was stopped goes on from there, if it is given the same student again.

    Raises:
        ConfigError: the cache belongs to other data or another space, there are no products to
            round, or `out` holds another run.
        KeyboardInterrupt: Ctrl-C, after the step in hand was saved.
    """
    towers = quantized_towers(grids)
    _check(student, cache, source, towers)

    def losses(batch: Batch) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        with full_precision(student.device):  # a bfloat16 has no more digits than an int8
            if "image" in towers:
                parts["image"] = feature(student.embed_image(batch.pixels), batch.teacher_image)
            if "text" in towers:
                assert batch.ids is not None
                assert batch.teacher_text is not None
                parts["text"] = feature(student.embed_text(batch.ids), batch.teacher_text)
        return {"total": torch.stack([*parts.values()]).mean(), **parts}

    task = Task(
        title="fine-tune",
        module=student,
        batch=Batches(student, cache, source, settings),
        losses=losses,
        identity=_identity(student, cache, grids),
    )
    with fake_quantized(student, grids), _only(student, towers):
        train(task, settings, out)


def tower_parts(tower: Tower) -> tuple[str, ...]:
    """Return how the names of a tower's modules and weights in a `DualEncoder` begin."""
    return _PARTS[tower]


def quantized_towers(grids: ProductGrids) -> tuple[Tower, ...]:
    """Return the towers that have products to round."""
    return tuple(
        tower for tower, parts in _PARTS.items() if any(name.startswith(parts) for name in grids)
    )


def _check(
    student: DualEncoder, cache: TeacherCache, source: Source, towers: tuple[Tower, ...]
) -> None:
    """Refuse data that do not belong together.

    Raises:
        ConfigError: says what does not.
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
    if "text" in towers and cache.text is None:
        raise ConfigError(f"{source.name}: fine-tuning the text tower needs captions")


@contextmanager
def _only(student: DualEncoder, towers: tuple[Tower, ...]) -> Iterator[None]:
    """Leave all weights as they are but those of some towers, while the block lasts."""
    before = [(weight, weight.requires_grad) for weight in student.parameters()]
    chosen = tuple(part for tower in towers for part in _PARTS[tower])
    for name, weight in student.named_parameters():
        weight.requires_grad_(name.startswith(chosen))
    try:
        yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)


def _identity(student: DualEncoder, cache: TeacherCache, grids: ProductGrids) -> str:
    """Say which run it is; ranges that differ in their last digits are the same."""
    plain = {name: asdict(grid) for name, grid in grids.items()}
    for grid in plain.values():
        grid["input"]["scale"] = f"{grid['input']['scale']:.{_DIGITS}g}"
    parts = (space_fingerprint(student), asdict(cache.settings), plain)
    return "quantization-aware " + json.dumps(parts, sort_keys=True)
