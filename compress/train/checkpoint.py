"""Save and load the state of a training run: tensors as safetensors, all else as JSON."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeclip.runtime.bundle.files import atomic_directory, sha256_file
from edgeclip.runtime.errors import ConfigError

_NAME = "checkpoint-"  # the step follows
_STATE = "state.json"

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        values: plain JSON data, such as the step.
        tensors: named groups of tensors, each a file of its own, such as weights and optimizer.
    """

    values: dict[str, Any]
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


def checkpoint_folder(run: Path) -> Path | None:
    """Return the directory of a run's latest checkpoint, `checkpoint-STEP`, if there is one."""
    return max(_folders(run), default=None, key=_step)


def save_checkpoint(run: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a step, whole or not at all, and then delete those of other steps.

    Every file's SHA-256 is kept, since safetensors has none.

    Raises:
        InputError: the disk is full; the last checkpoint is kept whole.
    """
    target = run / f"{_NAME}{step}"
    with atomic_directory(target, replace=True, marker=_STATE) as folder:
        hashes = {}
        for name, tensors in checkpoint.tensors.items():
            path = folder / f"{name}.safetensors"
            # Cloned, since no two may share their memory.
            own = {key: value.detach().cpu().clone() for key, value in tensors.items()}
            save_file({key: value.contiguous() for key, value in own.items()}, path)
            hashes[path.name] = sha256_file(path)
        text = json.dumps({**checkpoint.values, "sha256": hashes}, indent=2, sort_keys=True)
        (folder / _STATE).write_text(text + "\n", encoding="utf-8")
    for other in _folders(run):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(run: Path) -> Checkpoint | None:
    """Read the latest checkpoint of a run, its tensors on the CPU; None if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    folder = checkpoint_folder(run)
    if folder is None:
        return None
    try:
        values = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors: dict[str, Tensors] = {}
        for name, digest in values.pop("sha256").items():
            path = folder / name
            if sha256_file(path) != digest:
                raise ValueError(f"{name} was altered")
            tensors[path.stem] = load_file(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{folder} is damaged; delete it to start again") from error
    return Checkpoint(values=values, tensors=tensors)


def _folders(run: Path) -> list[Path]:
    return [path for path in run.glob(f"{_NAME}*") if path.is_dir() and _step(path) >= 0]


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(_NAME)
    return int(number) if number.isdecimal() else -1


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> Tensors:
    """Return the state of optimizers as `OPTIMIZER.NUMBER.NAME`, by the number of the weight."""
    return {
        f"{place}.{number}.{key}": value
        for place, optimizer in enumerate(optimizers)
        for number, own in optimizer.state_dict()["state"].items()
        for key, value in own.items()
    }


def load_optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: Tensors) -> None:
    """Give optimizers over the same weights the state of `optimizer_tensors`."""
    states: list[dict[int, Tensors]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        place, number, key = name.split(".", 2)
        states[int(place)].setdefault(int(number), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
